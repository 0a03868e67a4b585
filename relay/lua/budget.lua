-- Shared by the scripts that know what Voucherify allows: put in after lib.lua.
--
-- Calls are counted in ledgers, one for each window: a list of the times of its last
-- calls. What Voucherify's headers say of the plan is kept beside them, in
-- {prefix}:plan:<egress>, by the window's length in ms:
--   limit:<ms>   calls that the plan allows in such a window
--   others:<ms>  how many of them somebody else was seen to make
--   heard:<ms>   when, in ms
--   short:<ms>   when hardly anything was left, in ms
-- Settings, packed: {egress, {{calls, period_ms}...}, reserve, stale_ms, deaths_max}
--
-- Two calls stamped a period apart can reach Voucherify closer together than that:
-- each takes its own time to leave. The windows are kept this much longer.
local SLACK_MS = 100
-- Plans are told in calls a minute ("API limits"); the limit of an address is the only
-- smaller one, 5 in 5 s.
local MINUTE_MS, ADDRESS_MS, ADDRESS_MOST = 60000, 5000, 20
-- What others were seen to use counts half after so many windows. It was seen at a
-- peak, and a checkout has the next peak when the shop does.
local HALVES_AFTER = 5
-- A window that is shared is spent evenly, in so many parts: in one go, whoever comes
-- after it finds nothing left, and the relay would not see what comes after it.
local PARTS = 10
local PLAN_KEPT_MS = 7 * 86400000
local NOT_OURS = {api_calls_cycle = true, bulk_api_calls = true, webhook_calls = true}

-- By period alone: relays with different settings still see each other's calls.
local function ledger(egress, period) return P .. ':budget:' .. egress .. ':' .. period end

-- The window that a limit of the headers is about, since they name none: the one that
-- was set for it, give or take a factor of two.
local function period_of(budget, limit)
  local found = limit <= ADDRESS_MOST and ADDRESS_MS or MINUTE_MS
  local nearest = 2
  for _, window in ipairs(budget) do
    local off = math.max(limit / window[1], window[1] / limit)
    if off <= nearest then found, nearest = window[2], off end
  end
  return found
end

local function faded(others, heard_ms, period)
  return others * 0.5 ^ (math.max(0, now_ms - heard_ms) / (HALVES_AFTER * period))
end

-- An answer said how much of a limit is left: what is missing and is not ours, others
-- have used. Too little where our calls of a window that began anew still count as of
-- this one; so the most that was seen counts, and fades. Where hardly anything is left,
-- others were refused perhaps, and what they would have used cannot be seen: then more
-- is left to them, once in a window.
local function learn(settings, limit, remaining, kind)
  if limit <= 0 or remaining < 0 or NOT_OURS[kind] then return end
  local egress, period = settings[1], period_of(settings[2], limit)
  local key = P .. ':plan:' .. egress
  local told = call('HMGET', key, 'others:' .. period, 'heard:' .. period,
    'short:' .. period)
  local seen = limit - remaining - call('LLEN', ledger(egress, period))
  local known = faded(tonumber(told[1] or 0), tonumber(told[2] or now_ms), period)
  local others, least = math.max(seen, known, 0), limit * settings[3] / 2
  if remaining < least and math.abs(now_ms - tonumber(told[3] or 0)) >= period then
    others = math.min(others + least, limit)
    call('HSET', key, 'short:' .. period, now_ms)
  end
  call('HSET', key, 'limit:' .. period, limit, 'heard:' .. period, now_ms,
    'others:' .. period, string.format('%.3f', others))
  call('PEXPIRE', key, PLAN_KEPT_MS)
end

-- How many calls may go now, and the ms until there are more, in a window of the plan.
local function evenly(window)
  local most = math.ceil(window[1] / PARTS)
  local since_ms = now_ms - window[2] / PARTS
  for made = 0, most - 1 do
    local at_ms = tonumber(call('LINDEX', window[3], made) or 0)
    if at_ms <= since_ms then return most - made, 0 end
  end
  local first_ms = tonumber(call('LINDEX', window[3], most - 1))
  return 0, math.ceil(first_ms - since_ms)
end

-- The windows that hold now: {calls, period_ms, ledger, limit of the plan or nil,
-- calls of others or nil}, calls being without a bound where only the ledger is kept.
-- Of a plan that is known, the reserve is left to others, or more if they use more; and
-- one call stays, or nobody would hear that it is over. Without a budget
-- nothing is kept back.
local function windows_of(settings)
  local egress, budget, reserve = settings[1], settings[2], settings[3]
  local out, known = {}, {}
  if #budget == 0 then return out end
  local flat = call('HGETALL', P .. ':plan:' .. egress)
  for i = 1, #flat, 2 do known[flat[i]] = tonumber(flat[i + 1]) end
  local function add(calls, period)
    local limit = known['limit:' .. period]
    local window = {calls, period, ledger(egress, period), limit}
    if limit then
      local others = faded(known['others:' .. period], known['heard:' .. period], period)
      -- No two minutes of a checkout are alike: beyond what was seen half the reserve
      -- stays free.
      local kept = math.max(limit * reserve, others * (1 + reserve / 2) + limit * reserve / 2)
      local left = math.max(1, math.floor(limit - kept))
      window[1] = math.min(calls, left)
      window[5] = others
    end
    out[#out + 1] = window
  end
  local set = {}
  for _, window in ipairs(budget) do
    add(window[1], window[2])
    set[window[2]] = true
  end
  for _, period in ipairs({ADDRESS_MS, MINUTE_MS}) do
    if not set[period] then add(math.huge, period) end
  end
  return out
end
