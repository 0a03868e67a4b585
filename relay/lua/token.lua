#!lua flags=allow-oom
-- Keep the access token that all relays share, and let one of them at a time renew it.
-- A token that was replaced meanwhile is never overwritten by one who lost the lock.
--
-- KEYS  1 prefix
-- ARGV  1 name of the token  2 who asks  3 what
--   look    4 ms to lock it for, 0 to leave it
--           Reply {{field, value...}, ms it lives on, 1 if who asks has the lock}
--   keep    4 generation it replaces  5 ms it lives  6.. field, value...
--           Reply its generation; 0: not kept, there is a newer one
--   worked  4 generation that Voucherify took an event with
--           Reply 1, or 0 if that one is not kept any more
--   unlock  Reply 1, or 0 if it was not theirs
local token = P .. ':oauth:' .. ARGV[1]
local lock = token .. ':lock'
local who, what = ARGV[2], ARGV[3]
local mine = call('GET', lock) == who

if what == 'look' then
  local lock_ms = tonumber(ARGV[4])
  if lock_ms > 0 and (mine or call('EXISTS', lock) == 0) then
    mine = true  -- again: the answer to the first time may have been lost
    call('SET', lock, who, 'PX', lock_ms)
  end
  return {call('HGETALL', token), call('PTTL', token), mine and 1 or 0}
elseif what == 'keep' then
  local known = tonumber(call('HGET', token, 'generation') or 0)
  local replaced = tonumber(ARGV[4])
  if not mine and known > replaced then return 0 end
  -- The time, but growing whatever the clock does.
  local generation = math.max(now_ms, known + 1, replaced + 1)
  call('DEL', token)
  call('HSET', token, 'generation', string.format('%.0f', generation),
    unpack(ARGV, 6))
  call('PEXPIRE', token, ARGV[5])
  return generation
elseif what == 'worked' then
  if call('HGET', token, 'generation') ~= ARGV[4] then return 0 end
  call('HSET', token, 'worked', '1')
  return 1
end
return mine and call('DEL', lock) or 0
