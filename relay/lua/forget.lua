#!lua flags=allow-oom
-- Erase one person from a part of what is kept, some entries at a time: called until
-- it returns no cursor. An event that waits becomes `dropped`; a dead letter has its
-- outcome already. What a forwarder has in its hands is left to it.
--
-- KEYS  1 prefix
-- ARGV  1 place: a lane, `delayed` or `dead`  2 cursor, empty for the first call
--       3 how many entries to look at  4 the person: customer.source_id or customer.id
--       5 the same as JSON, as it stands in a body
-- Reply packed {cursor or '', erased, in flight, mentions}: `mentions` are events of
--       others that name this person as their referrer, and stay
local place, cursor, size = ARGV[1], ARGV[2], tonumber(ARGV[3])
local person, needle = ARGV[4], ARGV[5]
local erased, in_flight, mentions = 0, 0, 0

-- "theirs", "mentioned" or nil. The search comes first: it costs far less than
-- unpacking, and nearly every event is somebody else's.
local function about(text, body)
  if not string.find(text, needle, 1, true) then return nil end
  local event = cjson.decode(body())
  local customer, referral = event.customer or {}, event.referral
  if customer.source_id == person or customer.id == person then return 'theirs' end
  if type(referral) == 'table' and referral.referrer_id == person then
    return 'mentioned'
  end
end

local function drop(packed)
  local event = open(packed)
  count('dropped', 1)
  note('reason:forgotten', 1)
  count_event(event.name, 'dropped', 1)
  tell(event, {outcome = 'dropped', reason = 'forgotten'})
  erased = erased + 1
end

local function look_at_lane()
  local from = cursor == '' and '-' or '(' .. cursor
  local found = call('XRANGE', stream(place), from, '+', 'COUNT', size)
  for _, item in ipairs(found) do
    local id, packed = item[1], entry(item[1], item[2]).e
    local whose = about(packed, function() return open(packed).body end)
    if whose == 'mentioned' then mentions = mentions + 1 end
    if whose == 'theirs' then
      local pending = redis.pcall('XPENDING', stream(place), GROUP, id, id, 1)
      if not pending.err and #pending > 0 then
        in_flight = in_flight + 1
      else
        drop(packed)
        remove(place, id)
      end
    end
  end
  return #found == size and found[#found][1] or ''
end

local function look_at_delayed()
  local step = call('ZSCAN', P .. ':delayed', cursor == '' and '0' or cursor,
    'COUNT', size)
  for i = 1, #step[2], 2 do
    local member = step[2][i]
    local whose = about(member, function() return open(cmsgpack.unpack(member)[1]).body end)
    if whose == 'mentioned' then mentions = mentions + 1 end
    if whose == 'theirs' and call('ZREM', P .. ':delayed', member) == 1 then
      drop(cmsgpack.unpack(member)[1])
    end
  end
  return step[1] ~= '0' and step[1] or ''
end

local function look_at_dead()
  local from = cursor == '' and '-' or '(' .. cursor
  local found = call('XRANGE', P .. ':dead', from, '+', 'COUNT', size)
  for _, item in ipairs(found) do
    local fields = {}
    for i = 1, #item[2], 2 do fields[item[2][i]] = item[2][i + 1] end
    local whose = about(fields.body, function() return fields.body end)
    if whose == 'mentioned' then mentions = mentions + 1 end
    if whose == 'theirs' then
      call('XDEL', P .. ':dead', item[1])
      erased = erased + 1
    end
  end
  return #found == size and found[#found][1] or ''
end

local next_cursor
if place == 'delayed' then
  next_cursor = look_at_delayed()
elseif place == 'dead' then
  next_cursor = look_at_dead()
else
  next_cursor = look_at_lane()
end
write_counts()
return cmsgpack.pack({next_cursor, erased, in_flight, mentions})
