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

local function part(event, name)
  return type(event[name]) == 'table' and event[name] or {}
end

-- "theirs", "mentioned" or nil. The search comes first: it costs far less than
-- unpacking, and nearly every event is somebody else's.
local function about(text, body)
  if not text or not string.find(text, needle, 1, true) then return nil end
  -- Nothing may fail here: what was dropped before it in this call is not counted yet.
  local read, event = pcall(function() return cjson.decode(body()) end)
  if not read or type(event) ~= 'table' then return nil end
  local customer = part(event, 'customer')
  if customer.source_id == person or customer.id == person then return 'theirs' end
  if part(event, 'referral').referrer_id == person then return 'mentioned' end
end
local function about_entry(packed)
  local truly = held_there(packed)
  return about(truly, function() return open(truly).body end)
end

local function is_pending(lane, id)
  local pending = redis.pcall('XPENDING', stream(lane), GROUP, id, id, 1)
  return not pending.err and #pending > 0
end

local function drop(packed)
  local truly, key = held_there(packed)
  local event = open(truly)
  if key then call('DEL', key) end
  count('dropped', 1)
  note('reason:forgotten', 1)
  count_event(event.name, 'dropped', 1)
  tell(event, {outcome = 'dropped', reason = 'forgotten'})
  erased = erased + 1
end

-- Whoever is gone from behind a lane waits in no row there.
local function step_out(customer, id)
  local lane = string.match(place, '^(%a+):behind$')
  if not lane then return end
  call('LREM', row(lane, customer), 1, id)
  if call('EXISTS', row(lane, customer)) == 0 then call('ZREM', ready(lane), customer) end
end

local function look_at_lane()
  local from = cursor == '' and '-' or '(' .. cursor
  local found = call('XRANGE', stream(place), from, '+', 'COUNT', size)
  for _, item in ipairs(found) do
    local id, packed = item[1], entry(item[1], item[2]).e
    local whose = about_entry(packed)
    if whose == 'mentioned' then mentions = mentions + 1 end
    if whose == 'theirs' and is_pending(place, id) then
      in_flight = in_flight + 1
    elseif whose == 'theirs' then
      drop(packed)
      remove(place, id)
      step_out(open(packed).customer, id)
    end
  end
  return #found == size and found[#found][1] or ''
end

-- What is being tried again has left the delayed set, and may come back to it. Few, so
-- each call looks at them all.
local function look_at_retry()
  for _, item in ipairs(call('XRANGE', stream('retry'), '-', '+')) do
    if about_entry(entry(item[1], item[2]).e) == 'theirs' then
      in_flight = in_flight + 1
    end
  end
end

-- From the first that is due to the last. An event that is tried again comes back with
-- a later time, so it is met there, unless it was away when the walk passed: then it
-- was being tried at some call, and that call has seen it.
local function look_at_delayed()
  look_at_retry()
  local key = P .. ':delayed'
  local from = cursor == '' and '-inf' or '(' .. cursor
  local found = call('ZRANGEBYSCORE', key, from, '+inf', 'WITHSCORES', 'LIMIT', 0, size)
  local last = found[#found]
  if #found == 2 * size then  -- and whatever else is due in the same millisecond
    found = call('ZRANGEBYSCORE', key, from, last, 'WITHSCORES')
  end
  for i = 1, #found, 2 do
    local member = found[i]
    local whose = about_entry(cmsgpack.unpack(member)[1])
    if whose == 'mentioned' then mentions = mentions + 1 end
    if whose == 'theirs' and call('ZREM', key, member) == 1 then
      drop(cmsgpack.unpack(member)[1])
    end
  end
  return #found >= 2 * size and last or ''
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
