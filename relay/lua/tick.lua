#!lua flags=allow-oom
-- Hand a forwarder what it may send now: budget first, then events by lane.
--
-- Strict priority high, normal, low; of every ten turns one goes to `low` and one
-- to `normal` first, so neither starves. A due retry takes every other turn: it is
-- older than what waits, and a storm of retries leaves half the calls to the rest.
-- One customer's events go one at a time and in their order: who has one in flight
-- steps behind the lane with the others, and customers there take every other turn of
-- it, one after the other, so one customer's flood leaves half of a lane to the rest.
-- When a long window's calls would run out, {prefix}:pace slows the lower lanes down.
-- Dead forwarders are taken over: what they may have sent follows its delivery rule.
--
-- KEYS  1 prefix
-- ARGV  1 consumer  2 how many it can take  3 settings, as budget.lua has them
--       4 "1" to look out for dead forwarders in this tick
--       5 what this one has in flight, packed {"lane:entry id"...}
-- Reply packed {{{lane, entry id, received_ms, attempts, id, name, delivery,
--         body, doubted_ms}...}, wait_ms, probe, doorbell}: when to ask again;
--         `probe` when the one event is to try whether a hold is over; `doorbell` the
--         last id of each lane when nothing was there, to wait with XREAD BLOCK
local EXPIRED_AT_ONCE = 1000  -- bounds one tick when a whole backlog is too old
local STEPS_BEHIND = 500  -- the same for a customer's flood
local BUSY_MS = 1000  -- a due retry of a customer who has another event in flight
local ORPHANS = 100  -- looked at in each look-out
local PROBE_LEASE_MS = 15000  -- longer than a call may take: one probe at a time
local LOOKED_AT = 100  -- at the front of each lane, for a probe or for what is too old
local PACE_KEPT_MS = 3600000  -- whoever set it has not looked since: it holds no more

local consumer, wanted = ARGV[1], tonumber(ARGV[2])
local settings = cmsgpack.unpack(ARGV[3])
local egress, stale_ms, deaths_max = settings[1], settings[4], settings[5]
local flow = P .. ':flow'

local function group_missing(err)
  return type(err) == 'table' and err.err and string.find(err.err, 'NOGROUP', 1, true)
end
local function make_group(lane)
  -- From 0: whatever is in the stream is unsettled, also after a lost group.
  call('XGROUP', 'CREATE', stream(lane), GROUP, '0', 'MKSTREAM')
end

-- The server's clock stepped back (a failover): every time that was noted lies too
-- far ahead by as much, and would hold things up for as long.
local workers = P .. ':workers'
local last_ms = tonumber(call('HGET', flow, 'last_ms') or now_ms)
local back_ms = last_ms - now_ms
if back_ms > 1000 then
  for _, field in ipairs({'probe_at_ms', 'since_ms', 'ends_ms', 'by_hand_since_ms'}) do
    if call('HEXISTS', flow, field) == 1 then call('HINCRBY', flow, field, -back_ms) end
  end
  call('DEL', P .. ':pause:' .. egress)
  call('DEL', workers)
  local delayed = call('ZRANGE', P .. ':delayed', 0, 9999, 'WITHSCORES')
  for i = 1, #delayed, 2 do
    local x = postponed(delayed[i])
    if x.v > 0 then
      call('ZREM', P .. ':delayed', delayed[i])
      x.v = x.v - back_ms
      postpone(x, delayed[i + 1] - back_ms)
    else
      call('ZINCRBY', P .. ':delayed', -back_ms, delayed[i])
    end
  end
end
-- Nobody asked for a while: Redis was away, or the clock jumped. Then missing
-- heartbeats prove nothing yet, and everyone gets the time to be heard again.
if back_ms > 1000 then
  -- One that was given before would end by the old clock, as much later.
  call('SET', P .. ':amnesty', '', 'PX', stale_ms)
elseif -back_ms > stale_ms / 2 then
  call('SET', P .. ':amnesty', '', 'PX', stale_ms, 'NX')
end
call('HSET', flow, 'last_ms', now_ms)
call('HSET', workers, consumer, now_ms)

local out, wait_ms, probe = {}, -1, false
local HELD_LOOK_MS = 1000  -- how soon a lifted hold by hand is noticed

-- What holds delivery back: a hold, or a pause that Voucherify asked for.
local hold = call('HGET', flow, 'hold')
local allowed = wanted
if call('HEXISTS', flow, 'by_hand') == 1 then  -- a person's word: not even a probe
  allowed, wait_ms = 0, HELD_LOOK_MS
elseif hold then
  local probe_at = tonumber(call('HGET', flow, 'probe_at_ms') or 0)
  if probe_at <= now_ms then
    allowed, probe = math.min(1, wanted), true
  else
    allowed, wait_ms = 0, probe_at - now_ms
  end
end
local paused = tonumber(call('GET', P .. ':pause:' .. egress) or 0) - now_ms
if paused > 0 then allowed, wait_ms = 0, math.max(wait_ms, paused) end

-- The upstream budget: for each window, the times of its last calls.
local ledgers = {}
for _, window in ipairs(windows_of(settings)) do
  local calls, period, key = window[1], window[2] + SLACK_MS, window[3]
  ledgers[#ledgers + 1] = {key, period}
  local newest = tonumber(call('LINDEX', key, 0) or 0)
  if newest > now_ms + 1000 then  -- the clock stepped back: count them all as of now
    local n = call('LLEN', key)
    call('DEL', key)
    for _ = 1, n do call('LPUSH', key, now_ms) end
  end
  local oldest = tonumber(call('LINDEX', key, -1) or 0)
  while oldest > 0 and now_ms - oldest >= period do
    call('RPOP', key)
    oldest = tonumber(call('LINDEX', key, -1) or 0)
  end
  local used = call('LLEN', key)
  local free = calls - used
  if free < allowed then allowed = math.max(free, 0) end
  if free <= 0 then
    -- When the window has room: it may have become narrower than what is in it.
    local frees = tonumber(call('LINDEX', key, calls - 1))
    wait_ms = math.max(wait_ms, frees + period - now_ms)
  elseif window[4] then
    local now, later_ms = evenly(window)
    if now < allowed then allowed = now end
    wait_ms = math.max(wait_ms, later_ms)
  end
end

local function give(lane, id, x, event)
  call('HSET', BUSY, event.customer, lane .. ':' .. id)
  out[#out + 1] = {lane, id, x.r, x.a, event.id, event.name, event.delivery, event.body,
    math.min(x.v, now_ms)}
end

-- What a forwarder left behind goes by its rule: given up, or back into the queue,
-- where time to live and budget meet it like any other.
local function take_over(lane, id, died)
  local found = call('XRANGE', stream(lane), id, id)
  local customer
  if #found > 0 then
    local x = entry(id, found[1][2])
    local event = open(x.e)
    customer = event.customer
    x.d = x.d + died
    local sent = call('HEXISTS', P .. ':sent', lane .. ':' .. id) == 1
    if sent and event.delivery ~= 'at_least_once' then
      doubt(x, event, lane .. ':' .. id, 'worker_died', {}, settings[6])
    elseif x.d >= deaths_max then
      expire(x, event, 'worker_died', {})
    else
      postpone(x, now_ms)
    end
  end
  remove(lane, id, customer)
end

-- Whoever is behind a lane is in flight, or may go on. Where a group was lost, or a
-- script failed half way, neither may be so: then it is mended here.
local function mend(lane)
  for _, item in ipairs(call('XRANGE', behind(lane), '-', '+', 'COUNT', ORPHANS)) do
    local customer = open(entry(item[1], item[2]).e).customer
    if not is_busy(customer) then let_go_on(customer) end
  end
end

-- Dead forwarders are those whose heartbeat stopped. And an answer to this forwarder
-- may have been lost, with events in it that it does not know it has.
local held = {}
for _, place in ipairs(cmsgpack.unpack(ARGV[5])) do held[place] = true end
local function look_out(lane)
  local consumers = redis.pcall('XINFO', 'CONSUMERS', stream(lane), GROUP)
  if consumers.err then return end  -- no stream or no group yet
  local amnesty = call('EXISTS', P .. ':amnesty') == 1
  for _, c in ipairs(consumers) do
    local info = {}
    for i = 1, #c, 2 do info[c[i]] = c[i + 1] end
    local mine = info.name == consumer
    local beat = tonumber(call('HGET', workers, info.name) or 0)
    if info.pending > 0 and (mine or now_ms - beat > stale_ms and not amnesty) then
      local pending = call('XPENDING', stream(lane), GROUP, '-', '+', 1000, info.name)
      for _, p in ipairs(pending) do
        if not mine then
          take_over(lane, p[1], 1)
        elseif not held[lane .. ':' .. p[1]] then
          take_over(lane, p[1], 0)
        end
      end
    end
  end
end

-- Where a lane begins that nobody has read.
local function unread(lane)
  local groups = redis.pcall('XINFO', 'GROUPS', stream(lane))
  for _, group in ipairs(groups.err and {} or groups) do
    for f = 1, #group, 2 do
      if group[f] == 'last-delivered-id' then return '(' .. group[f + 1] end
    end
  end
  return '-'
end

-- What is too old goes when its time is over, also while nothing may be sent; what is
-- hidden behind others that live, when its turn comes.
local function sweep(lane, from, step_out)
  local swept, all_old = 0, true
  while all_old and swept < EXPIRED_AT_ONCE do
    local found = call('XRANGE', stream(lane), from, '+', 'COUNT', LOOKED_AT)
    all_old = #found > 0
    for _, item in ipairs(found) do
      local x = entry(item[1], item[2])
      local truly, key = held_there(x.e)
      local event = open(truly)
      local received_ms = key and tonumber(call('HGET', key, 'r')) or x.r
      -- One that a lost group handed out may have arrived: it is judged when it is read.
      local was_out = call('HEXISTS', P .. ':sent', lane .. ':' .. item[1]) == 1
      if now_ms > received_ms + event.ttl and not was_out then
        x.r = received_ms
        expire(x, event, 'ttl', {})
        call('XDEL', stream(lane), item[1])
        if key then call('DEL', key) end
        if step_out then call('LREM', row(step_out, event.customer), 1, item[1]) end
        swept = swept + 1
      else
        all_old = false
      end
    end
  end
end
if ARGV[4] == '1' then
  for _, name in ipairs(STREAMS) do look_out(name) end
  for _, lane in ipairs(LANES) do
    mend(lane)
    sweep(lane, unread(lane))
    sweep(lane .. ':behind', '-', lane)
  end
end

local function read(lane)
  local args = {'XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', 1, 'STREAMS',
    stream(lane), '>'}
  local got = redis.pcall(unpack(args))
  if group_missing(got) then
    make_group(lane)
    got = call(unpack(args))
  elseif type(got) == 'table' and got.err then
    error(got.err)
  end
  if not got then return nil end
  local id, fields = got[1][2][1][1], got[1][2][1][2]
  return id, entry(id, fields)
end

-- What comes from elsewhere enters its stream only now, so that stream holds nothing
-- but events in flight.
local function enter_retry(x)
  call('XADD', stream('retry'), '*', unpack(known(x)))
  return read('retry')
end

-- With none due the stream is read all the same: a script that failed half way may
-- have left one behind there. A probe takes one that is not due yet as well, unless it
-- is in doubt: to look it up too early is to send it twice.
local function read_due()
  local key = P .. ':delayed'
  local due = call('ZRANGE', key, '-inf', probe and '+inf' or now_ms, 'BYSCORE', 'LIMIT',
    0, probe and LOOKED_AT or 20, 'WITHSCORES')
  for i = 1, #due, 2 do
    local member, early = due[i], tonumber(due[i + 1]) > now_ms
    local x = postponed(member)
    if not early or x.v == 0 then
      if not is_busy(open(x.e).customer) then
        call('ZREM', key, member)
        return enter_retry(x)
      end
      call('ZADD', key, 'GT', now_ms + BUSY_MS, member)
    end
  end
  return read('retry')
end

-- The next event of the customer who waits longest behind a lane.
local function read_ready(lane)
  while true do
    local customer = call('ZRANGE', ready(lane), 0, 0)[1]
    if not customer then return nil end
    call('ZREM', ready(lane), customer)
    local id = not is_busy(customer) and call('LPOP', row(lane, customer))
    while id do
      local found = call('XRANGE', behind(lane), id, id)
      if #found > 0 then  -- else it was erased meanwhile
        call('XDEL', behind(lane), id)
        return enter_retry(entry(id, found[1][2]))
      end
      id = call('LPOP', row(lane, customer))
    end
  end
end

-- The next event of a lane whose customer has none in flight and none behind it.
local steps = 0
local function read_lane(lane)
  while steps < STEPS_BEHIND do
    local id, x = read(lane)
    if not id then return nil end
    local customer, place = open(x.e).customer, lane .. ':' .. id
    -- Handed out before, when a group was lost or Redis went back in time: that is for
    -- the caller to judge, by a mark that it must not lose here.
    if call('HEXISTS', P .. ':sent', place) == 1 then return id, x end
    if not is_busy(customer, place) and call('EXISTS', row(lane, customer)) == 0 then
      return id, x
    end
    local entry_id = call('XADD', behind(lane), '*', unpack(known(x)))
    call('RPUSH', row(lane, customer), entry_id)
    remove(lane, id)
    steps = steps + 1
  end
end

-- What probes may fail without an answer, and then nobody knows whether it arrived. So
-- rather one that may be sent again: the first such of a customer at the front of a lane.
local function read_probe()
  for _, lane in ipairs(LANES) do
    local met = {}
    for _, item in ipairs(call('XRANGE', stream(lane), unread(lane), '+', 'COUNT',
        LOOKED_AT)) do
      local x = entry(item[1], item[2])
      local event = open(x.e)
      local first = not met[event.customer] and not is_busy(event.customer)
        and call('EXISTS', row(lane, event.customer)) == 0
      met[event.customer] = true
      if first and event.delivery == 'at_least_once' and now_ms <= x.r + event.ttl then
        call('XDEL', stream(lane), item[1])
        return enter_retry(x)
      end
    end
  end
end

-- A lane that is slowed down gives one event at a time, so many ms apart.
local paces = {}
local flat_pace = call('HGETALL', P .. ':pace')
for i = 1, #flat_pace, 2 do
  paces[string.gsub(flat_pace[i], '_ms$', '')] = tonumber(flat_pace[i + 1])
end
if math.abs(now_ms - (paces.at or 0)) > PACE_KEPT_MS then paces = {} end
local function next_of_pace(lane)
  local gap = paces[lane] or 0
  if gap <= 0 then return 0 end
  -- A pace that was slower before, or a clock that stepped back, holds it up no longer.
  return math.min(tonumber(call('HGET', flow, 'next:' .. lane) or 0), now_ms + gap)
end
local function keep_pace(lane)
  local gap = paces[lane] or 0
  if gap > 0 then call('HSET', flow, 'next:' .. lane, now_ms + gap) end
end

local ORDERS = {
  [3] = {'low', 'high', 'normal'}, [7] = {'normal', 'high', 'low'},
}
local USUAL = {'high', 'normal', 'low'}
local turn = tonumber(call('HGET', flow, 'turn') or 0)
local first_turn = turn
local function next_event()
  turn = (turn + 1) % 20
  -- A probe takes one that was not tried yet, if there is any: what raised the hold may
  -- have been the event itself.
  if probe then
    local id, x = read_probe()
    if id then return 'retry', id, x end
  elseif turn % 2 == 0 then
    local id, x = read_due()
    if id then return 'retry', id, x end
  end
  local ready_first = turn % 4 < 2
  for _, lane in ipairs(ORDERS[math.floor(turn / 2)] or USUAL) do
    for _, from_row in ipairs({ready_first, not ready_first}) do
      local id, x
      if next_of_pace(lane) > now_ms then
        id = nil
      elseif from_row then
        id, x = read_ready(lane)
      else
        id, x = read_lane(lane)
      end
      if id then return from_row and 'retry' or lane, id, x end
    end
  end
  local id, x = read_due()
  if id then return 'retry', id, x end
  return nil
end

-- A coalesced event waits under its oldest one's place, and is what came last. From
-- here on the next one has to wait until the window is over.
local latest
function latest(lane, id, x)
  local event = open(x.e)
  if not event.window then return lane, id, x, event end
  local key = coalesce_key(event)
  local kept = call('HMGET', key, 'id', 'e', 'r')
  if kept[1] ~= event.id then return lane, id, x, event end
  local newest = kept[2] and fresh(kept[2], kept[3]) or x
  local last = open(newest.e)
  call('DEL', key)
  if now_ms <= newest.r + last.ttl then
    call('HSET', key, 'until', now_ms + last.window)
    call('PEXPIRE', key, last.window)
  end
  if newest == x then return lane, id, x, event end
  remove(lane, id)
  -- Where a group was lost, an older entry comes first, and may have such a place itself.
  return latest('retry', enter_retry(newest))
end

local empty, expired = false, 0
while #out < allowed and not empty do
  local its_turn = turn
  local lane, id, x = next_event()
  if not lane then
    empty = steps < STEPS_BEHIND
    if not empty then break end
  else
    local event
    lane, id, x, event = latest(lane, id, x)
    if event.delivery ~= 'at_least_once'
      and call('HEXISTS', P .. ':sent', lane .. ':' .. id) == 1 then
      -- Read as new, but marked as sent: Redis went back in time, or lost its group.
      doubt(x, event, lane .. ':' .. id, 'claimed_again', {}, settings[6])
      remove(lane, id, event.customer)
    elseif now_ms > x.r + event.ttl then
      expire(x, event, 'ttl', {})
      remove(lane, id, event.customer)
      turn = its_turn  -- or a lane would lose its share to what is too old in it
      expired = expired + 1
      if expired >= EXPIRED_AT_ONCE then break end
    else
      give(lane, id, x, event)
      keep_pace(event.lane)
    end
  end
end
if turn ~= first_turn then call('HSET', flow, 'turn', turn) end

if #out > 0 then
  for _, kept in ipairs(ledgers) do
    for _ = 1, #out do call('LPUSH', kept[1], now_ms) end
    call('PEXPIRE', kept[1], kept[2])
  end
  if probe then call('HSET', flow, 'probe_at_ms', now_ms + PROBE_LEASE_MS) end
end

local doorbell = {}
if empty then
  local next_due = call('ZRANGE', P .. ':delayed', 0, 0, 'WITHSCORES')
  wait_ms = next_due[2] and math.max(0, next_due[2] - now_ms) or -1
  for _, lane in ipairs(LANES) do  -- what only keeps its pace
    local left_ms = next_of_pace(lane) - now_ms
    if left_ms > 0 and (wait_ms < 0 or left_ms < wait_ms)
      and call('XLEN', stream(lane)) + call('XLEN', behind(lane)) > 0 then
      wait_ms = left_ms
    end
  end
  for i = 1, 3 do
    local info = call('XINFO', 'STREAM', stream(LANES[i]))
    for f = 1, #info, 2 do
      if info[f] == 'last-generated-id' then doorbell[i] = info[f + 1] end
    end
  end
elseif #out < wanted and wait_ms < 0 then
  wait_ms = 0  -- more may be there
end
write_counts()
return cmsgpack.pack({out, math.floor(wait_ms), probe, doorbell})
