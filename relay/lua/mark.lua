#!lua flags=allow-oom
-- Note that these events are about to be sent, before the first byte leaves: if
-- their forwarder dies now, they may have arrived.
--
-- KEYS  1 prefix
-- ARGV  1 consumer  2.. lane, entry id, lane, entry id, ...
-- Reply 1 or 0 for each: still this consumer's, so it may send it
local reply = {}
for i = 2, #ARGV, 2 do
  local mine = ours(ARGV[i], ARGV[i + 1], ARGV[1])
  if mine then call('HSET', P .. ':sent', ARGV[i] .. ':' .. ARGV[i + 1], now_ms) end
  reply[#reply + 1] = mine and 1 or 0
end
return reply
