#!lua flags=allow-oom
-- Give events in flight what their call came to: an outcome, another try, or back.
-- Each is settled once, and only by the forwarder that still owns it.
--
-- KEYS  1 prefix
-- ARGV  1 consumer  2 settings, as budget.lua has them
--       3 results, packed {{lane, entry id, verdict, reason, status, error,
--         delay_ms, signal, pause_ms, probe, limit, remaining, limit type}...}; limit
--         and remaining are -1 where the answer told none
--   verdict  delivered | retry | wait | release | resend | rejected | ambiguous: `retry`
--            spends an attempt, `wait` and `release` do not; `resend` is for one that was
--            looked up and is not there
--   signal   what the call says about Voucherify: ok | failed | none | a hold's name
-- Reply how many were settled
-- Names of the holds: relay/outcomes.py.
local FAILURES_TO_OPEN = 5
-- Probes cost one call each, and a queue may hold many events that fail by
-- themselves: a short longest wait bounds what they can hold up.
local HOLD_FIRST_MS, HOLD_MAX_MS = 5000, 30000
local BREAKER_FIRST_MS, BREAKER_MAX_MS = 1000, 10000
local TOLD_MAX_MS = 3600000  -- a plan may be raised before its cycle ends
-- One event that alone provokes a 403 (a firewall's doing) must not stop the rest
-- for ever: met again although others got through since, three times, it is refused.
local STRIKES = 3
-- A held event comes back after this, doubling with each strike: behind the others.
local HELD_MS = 30000
local STRIKING = {auth_hold = true, config_hold = true}

local consumer, settings = ARGV[1], cmsgpack.unpack(ARGV[2])
local egress = settings[1]
local flow = P .. ':flow'

local function raise_hold(hold, reason, told_ms, probe, first_ms, max_ms)
  local current = call('HGET', flow, 'hold')
  -- Answers to calls that were under way when the hold began say nothing new.
  if current and not probe then return end
  local delay = first_ms
  if current == hold then
    delay = math.min(2 * tonumber(call('HGET', flow, 'probe_delay_ms') or first_ms), max_ms)
  end
  local wait = math.min(math.max(delay, told_ms), TOLD_MAX_MS)
  if current ~= hold then
    call('HSET', flow, 'since_ms', now_ms)
    call('HDEL', flow, 'ends_ms')
  end
  call('HSET', flow, 'hold', hold, 'hold_reason', reason,
    'probe_delay_ms', delay, 'probe_at_ms', now_ms + wait)
  if told_ms > 0 then call('HSET', flow, 'ends_ms', now_ms + told_ms) end
end

local function hear(signal, reason, pause_ms, probe)
  if pause_ms > 0 and signal ~= 'plan_hold' then
    local until_ms = now_ms + pause_ms
    local key = P .. ':pause:' .. egress
    if tonumber(call('GET', key) or 0) < until_ms then
      call('SET', key, until_ms, 'PX', pause_ms)
    end
  end
  if signal == 'ok' then
    call('HINCRBY', flow, 'oks', 1)
    call('HDEL', flow, 'hold', 'hold_reason', 'since_ms', 'probe_at_ms', 'ends_ms',
      'probe_delay_ms', 'failures')
  elseif signal == 'failed' then
    local failures = call('HINCRBY', flow, 'failures', 1)
    if failures >= FAILURES_TO_OPEN then
      raise_hold('breaker_open', reason, 0, probe, BREAKER_FIRST_MS, BREAKER_MAX_MS)
    end
  elseif signal ~= 'none' then
    raise_hold(signal, reason, pause_ms, probe, HOLD_FIRST_MS, HOLD_MAX_MS)
  elseif probe then  -- neither yes nor no: ask again soon
    call('HSET', flow, 'probe_at_ms', now_ms + BREAKER_FIRST_MS)
  end
end

local function again(x, event, delay_ms, reason, info)
  local due = now_ms + delay_ms
  if due > x.r + event.ttl then
    expire(x, event, reason, info)
  else
    postpone(x, due)
  end
end

-- Whether a hold that this event met was the event's own doing, for the third time.
local function struck_out(x, signal)
  if not STRIKING[signal] then return false end
  local oks = tonumber(call('HGET', flow, 'oks') or 0)
  if x.k >= 0 and oks > x.k then x.s = x.s + 1 end
  x.k = oks
  return x.s >= STRIKES
end

local settled = 0
for _, result in ipairs(cmsgpack.unpack(ARGV[3])) do
  local lane, id, verdict, reason, status, err, delay_ms, signal, pause_ms, probe, limit,
    remaining, limit_type = unpack(result)
  -- Also from what is no longer ours: it is true of the plan all the same.
  learn(settings, limit, remaining, limit_type)
  local found = ours(lane, id, consumer) and call('XRANGE', stream(lane), id, id) or {}
  if #found > 0 then
    local x = entry(id, found[1][2])
    local event = open(x.e)
    local info = {status = status, error = err}
    x.d = 0  -- its forwarder lives
    if verdict == 'retry' then x.a = x.a + 1 end
    local held = signal ~= 'ok' and signal ~= 'failed' and signal ~= 'none'
    if held then delay_ms = HELD_MS * 2 ^ x.s end
    if verdict == 'delivered' then
      if x.v > 0 then note('doubt_found', 1) end
      count('delivered', 1)
      count_event(event.name, 'delivered', 1)
      tell(event, {outcome = 'delivered', upstream_status = status})
    elseif held and struck_out(x, signal) then
      bury(x, event, 'rejected', reason, info)
    elseif verdict == 'retry' or verdict == 'wait' or verdict == 'release' then
      again(x, event, delay_ms, reason, info)
    elseif verdict == 'resend' then
      note('doubt_absent', 1)
      x.v = 0
      again(x, event, 0, reason, info)
    elseif verdict == 'ambiguous' then
      doubt(x, event, lane .. ':' .. id, reason, info, settings[6])
    else
      bury(x, event, verdict, reason, info)
    end
    hear(signal, reason, pause_ms, probe)
    remove(lane, id, event.customer)
    settled = settled + 1
  end
end
write_counts()
return settled
