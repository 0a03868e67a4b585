#!lua flags=allow-oom
-- Hold delivery by hand, or lift that hold again. It stands beside the automatic holds,
-- which come and go by themselves; lifting it lets one of those probe at once.
--
-- KEYS  1 prefix
-- ARGV  1 hold | resume  2 the reason of a hold, a text
-- Reply {ms since when it is or was held by hand, 0 for never, its reason, the
--         automatic hold or ''}
local flow = P .. ':flow'
if ARGV[1] == 'hold' then
  call('HSETNX', flow, 'by_hand_since_ms', now_ms)  -- a new reason begins no new hold
  call('HSET', flow, 'by_hand', ARGV[2])
end
local since_ms = tonumber(call('HGET', flow, 'by_hand_since_ms') or 0)
local reason = call('HGET', flow, 'by_hand') or ''
local automatic = call('HGET', flow, 'hold') or ''
if ARGV[1] == 'resume' then
  call('HDEL', flow, 'by_hand', 'by_hand_since_ms')
  if automatic ~= '' then call('HDEL', flow, 'probe_at_ms') end
end
return {since_ms, reason, automatic}
