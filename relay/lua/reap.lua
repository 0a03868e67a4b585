#!lua flags=allow-oom
-- Keep house, and write the gauges from one consistent look at everything.
-- Every process calls it; at most one a second does the work.
--
-- KEYS  1 prefix
-- ARGV  1 settings, as budget.lua has them  2 idle ms after which an empty consumer is
--         removed
-- Reply {the gauges as a flat list of names and values, facts}; facts are empty for who
--       came too early, else packed for the forecast: {now_ms, wait_ms, {retrying, of
--       each lane}, when nearly all of them are due, {{waiting, per_s soon, per_s in the long run, first and last end in ms}...} of
--       the lanes, {{calls, period_ms, used, oldest_ms}...} of the windows}
local MINUTES, DAY_S = 60, 86400  -- how far back the two rates of arrival look
local ENDS_LOOKED_AT, SAMPLE = 5, 50
local gauges = P .. ':gauges'
local written = tonumber(call('HGET', gauges, 'updated_at_ms') or 0)
if now_ms >= written and now_ms - written < 1000 then
  return {call('HGETALL', gauges), ''}
end
local settings = cmsgpack.unpack(ARGV[1])

local workers = P .. ':workers'
local length, in_flight, oldest = 0, 0, now_ms
for _, name in ipairs(STREAMS) do
  local key = stream(name)
  length = length + call('XLEN', key)
  local pending = redis.pcall('XPENDING', key, GROUP)
  if not pending.err then in_flight = in_flight + pending[1] end
  local first = call('XRANGE', key, '-', '+', 'COUNT', 1)
  if #first > 0 then
    oldest = math.min(oldest, entry(first[1][1], first[1][2]).r)
  end
  if not pending.err then
    for _, c in ipairs(call('XINFO', 'CONSUMERS', key, GROUP)) do
      local info = {}
      for i = 1, #c, 2 do info[c[i]] = c[i + 1] end
      local beat = tonumber(call('HGET', workers, info.name) or 0)
      -- Deleting a consumer drops what it has pending; here the two are one step.
      if info.pending == 0 and now_ms - beat > tonumber(ARGV[2]) then
        call('XGROUP', 'DELCONSUMER', key, GROUP, info.name)
      end
    end
  end
end
local beats = call('HGETALL', workers)
for i = 1, #beats, 2 do
  if now_ms - beats[i + 1] > 2 * tonumber(ARGV[2]) then call('HDEL', workers, beats[i]) end
end

local delayed = call('ZCARD', P .. ':delayed')
local spooled = tonumber(call('HGET', gauges, 'spooled') or 0)
local total = P .. ':totals'
local unaccounted = tonumber(call('HGET', total, 'received') or 0)
  - length - delayed - spooled
for _, outcome in ipairs(OUTCOMES) do
  unaccounted = unaccounted - tonumber(call('HGET', total, outcome) or 0)
end
local flow = P .. ':flow'
local by_hand = call('HEXISTS', flow, 'by_hand') == 1
local hold = by_hand and 'by_hand' or call('HGET', flow, 'hold') or ''
local paused_until = tonumber(call('GET', P .. ':pause:' .. settings[1]) or 0)
if hold ~= '' and not by_hand then
  paused_until = math.max(paused_until,
    tonumber(call('HGET', flow, 'ends_ms') or call('HGET', flow, 'probe_at_ms') or 0))
end

local windows, rate = {}, 0
for _, window in ipairs(windows_of(settings)) do
  if window[1] < math.huge then
    local per_s = window[1] * 1000 / window[2]
    if rate == 0 or per_s < rate then rate = per_s end
    local oldest_ms = tonumber(call('LINDEX', window[3], -1) or now_ms)
    windows[#windows + 1] = {window[1], window[2] + SLACK_MS, call('LLEN', window[3]), oldest_ms}
  end
end

-- How many events come, from the number that the stream has ever had. The last hour by
-- the minute, whose middle half counts: a burst that is over is no forecast. And an
-- average over a day that fades, for what a month will bring.
local inflow = P .. ':inflow'
local last_ms = tonumber(call('HGET', inflow, 'at_ms') or now_ms)
local passed_s = math.max(0, now_ms - last_ms) / 1000
local minutes_on = math.max(0, math.floor(now_ms / 60000) - math.floor(last_ms / 60000))
call('HSET', inflow, 'at_ms', now_ms)

local function middle(counts)
  local sorted, sum = {unpack(counts)}, 0
  table.sort(sorted)
  for i = MINUTES / 4 + 1, MINUTES * 3 / 4 do sum = sum + sorted[i] end
  return sum / (MINUTES / 2)
end
local function arrivals(lane)
  local added = 0
  local info = redis.pcall('XINFO', 'STREAM', stream(lane))
  for f = 1, info.err and 0 or #info, 2 do
    if info[f] == 'entries-added' then added = info[f + 1] end
  end
  local known = call('HMGET', inflow, lane .. ':added', lane .. ':minutes', lane .. ':day')
  local came = math.max(0, added - tonumber(known[1] or added))
  local counts = known[2] and cmsgpack.unpack(known[2]) or {}
  for i = 1, MINUTES do counts[i] = counts[i] or 0 end
  local each = came / (minutes_on + 1)  -- the oldest first, the present minute last
  counts[MINUTES] = counts[MINUTES] + each
  for _ = 1, math.min(minutes_on, MINUTES) do
    table.remove(counts, 1)
    counts[MINUTES] = each
  end
  local day = tonumber(known[3] or 0)
  if passed_s > 0 then
    day = day + (came / passed_s - day) * (1 - math.exp(-passed_s / DAY_S))
  end
  call('HSET', inflow, lane .. ':added', added, lane .. ':minutes',
    cmsgpack.pack(counts), lane .. ':day', string.format('%.9g', day))
  return middle(counts) / 60, day
end

-- When the oldest and the newest of a lane expire, as far as its ends tell.
local function ends_of(lane)
  local first, last = math.huge, 0
  for _, key in ipairs({stream(lane), behind(lane)}) do
    for _, item in ipairs(call('XRANGE', key, '-', '+', 'COUNT', ENDS_LOOKED_AT)) do
      local x = entry(item[1], item[2])
      first = math.min(first, x.r + open(x.e).ttl)
    end
    for _, item in ipairs(call('XREVRANGE', key, '+', '-', 'COUNT', ENDS_LOOKED_AT)) do
      local x = entry(item[1], item[2])
      last = math.max(last, x.r + open(x.e).ttl)
    end
  end
  return math.min(first, last), last
end

local lanes = {}
for i, lane in ipairs(LANES) do
  local soon, long = arrivals(lane)
  local first, last = ends_of(lane)
  lanes[i] = {call('XLEN', stream(lane)) + call('XLEN', behind(lane)), soon, long, first,
    last}
end

-- What is tried again, of which lane, as far as a sample tells; and when nearly all of it
-- is due.
local retrying, due_ms = {}, now_ms
local sampled = math.min(delayed, SAMPLE)
for i, lane in ipairs(LANES) do retrying[i] = 0; retrying[lane] = i end
for n = 0, sampled - 1 do
  local rank = math.floor(n * delayed / sampled)
  local found = call('ZRANGE', P .. ':delayed', rank, rank, 'WITHSCORES')
  local i = retrying[open(cmsgpack.unpack(found[1])[1]).lane]
  retrying[i] = retrying[i] + delayed / sampled
  due_ms = math.max(due_ms, tonumber(found[2]))
end

call('HSET', gauges,
  'queued', length - in_flight, 'in_flight', in_flight, 'delayed', delayed,
  'dead', call('XLEN', P .. ':dead'), 'spooled', spooled,
  'unaccounted', unaccounted, 'oldest_age_ms', now_ms - oldest,
  'budget_per_s', string.format('%.6g', rate), 'hold', hold,
  'updated_at_ms', now_ms)
return {call('HGETALL', gauges), cmsgpack.pack({now_ms,
  math.max(0, paused_until - now_ms), {retrying[1], retrying[2], retrying[3]}, due_ms,
  lanes, windows})}
