#!lua flags=allow-oom
-- Keep house, and write the gauges from one consistent look at everything.
-- Every process calls it; at most one a second does the work.
--
-- KEYS  1 prefix
-- ARGV  1 budget in calls per second, 0 for no limit  2 idle ms after which an
--         empty consumer is removed  3 egress
-- Reply the gauges as a flat list of names and values
local gauges = P .. ':gauges'
local written = tonumber(call('HGET', gauges, 'updated_at_ms') or 0)
if now_ms >= written and now_ms - written < 1000 then return call('HGETALL', gauges) end

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
local waiting, rate = length + delayed, tonumber(ARGV[1])
local flow = P .. ':flow'
local hold = call('HEXISTS', flow, 'by_hand') == 1 and 'by_hand'
  or call('HGET', flow, 'hold') or ''
local paused = math.max(0, tonumber(call('GET', P .. ':pause:' .. ARGV[3]) or 0) - now_ms)
call('HSET', gauges,
  'queued', length - in_flight, 'in_flight', in_flight, 'delayed', delayed,
  'dead', call('XLEN', P .. ':dead'), 'spooled', spooled,
  'unaccounted', unaccounted, 'oldest_age_ms', now_ms - oldest,
  'eta_s', math.ceil((rate > 0 and waiting / rate or 0) + paused / 1000),
  'budget_per_s', ARGV[1], 'hold', hold,
  'updated_at_ms', now_ms)
return call('HGETALL', gauges)
