-- Events that are in flight or back from it: for the scripts of delivery and of `forget`.
local GROUP = 'relay'
local COALESCED_BYTE = 0x99  -- how a packed array of nine begins

-- The entries behind a lane that are one customer's, in their order; and the customers
-- of a lane whose next one may go, since none of theirs is in flight.
local function behind(lane) return P .. ':q:' .. lane .. ':behind' end
local function row(lane, customer) return P .. ':behind:' .. lane .. ':' .. customer end
local function ready(lane) return P .. ':ready:' .. lane end

-- What a place in the queue holds in truth: where events are coalesced, the last one.
-- Then also the key that goes with the place.
local function held_there(packed)
  if string.byte(packed) ~= COALESCED_BYTE then return packed end
  local event = open(packed)
  local key = coalesce_key(event)
  local kept = call('HMGET', key, 'id', 'e')
  if kept[1] ~= event.id then return packed end
  return kept[2] or packed, key
end

-- What is known of an event, from an entry's fields and back.
local function entry(id, fields)
  local f = {}
  for i = 1, #fields, 2 do f[fields[i]] = fields[i + 1] end
  return {e = f.e, r = tonumber(f.r) or tonumber(string.match(id, '^%d+')),
    a = tonumber(f.a) or 0, s = tonumber(f.s) or 0, k = tonumber(f.k) or -1,
    d = tonumber(f.d) or 0, v = tonumber(f.v) or 0}
end
local function known(x)
  local fields = {'e', x.e}
  for _, name in ipairs(KNOWN) do
    fields[#fields + 1] = name
    fields[#fields + 1] = x[name]
  end
  return fields
end
-- The other way round. One that an older version has put there has less.
local function postponed(member)
  local packed = cmsgpack.unpack(member)
  local x = {e = packed[1], v = 0}
  for i, name in ipairs(KNOWN) do x[name] = packed[i + 1] or x[name] end
  return x
end

local function ours(lane, id, consumer)
  local p = redis.pcall('XPENDING', stream(lane), GROUP, id, id, 1, consumer)
  return not p.err and #p > 0  -- with its group everything in flight is lost
end
-- One customer's events are in flight one at a time. Whoever had one, and has others
-- behind a lane, may go on there.
local BUSY = P .. ':busy'
local function let_go_on(customer)
  for _, lane in ipairs(LANES) do
    if call('EXISTS', row(lane, customer)) == 1 then
      call('ZADD', ready(lane), 'NX', now_us, customer)
    end
  end
end
local function is_in_flight(place)
  local lane, id = string.match(place, '^(.+):(%d+%-%d+)$')
  local pending = redis.pcall('XPENDING', stream(lane), GROUP, id, id, 1)
  return not pending.err and #pending > 0
end
local function is_busy(customer, own)
  local place = call('HGET', BUSY, customer)
  if not place or place == own then return false end
  if is_in_flight(place) then return true end
  call('HDEL', BUSY, customer)  -- its group was lost, and what was in flight with it
  return false
end
local function remove(lane, id, customer)
  call('XACK', stream(lane), GROUP, id)
  call('XDEL', stream(lane), id)
  call('HDEL', P .. ':sent', lane .. ':' .. id)
  if not customer then return end
  local place = call('HGET', BUSY, customer)
  if place and place ~= lane .. ':' .. id then return end
  if place then call('HDEL', BUSY, customer) end
  let_go_on(customer)
end

-- Keep the whole event until an operator replays or drops it.
local function bury(x, event, outcome, reason, info)
  add(P .. ':dead', 'id', event.id, 'event', event.name,
    'outcome', outcome, 'reason', reason, 'status', info.status or '',
    'error', info.error or '', 'attempts', x.a, 'received_ms', x.r,
    'doubted_ms', x.v > 0 and x.v or '',
    'lane', event.lane, 'delivery', event.delivery, 'customer', event.customer,
    'ttl_ms', event.ttl, 'replay_of', event.replay_of or '', 'body', event.body)
  count(outcome, 1)
  note('reason:' .. reason, 1)
  count_event(event.name, outcome, 1)
  tell(event, {outcome = outcome, reason = reason, upstream_status = info.status,
    error = info.error})
end

-- Its time is over. What may have arrived before is not simply too old.
local function expire(x, event, reason, info)
  bury(x, event, x.v > 0 and 'ambiguous' or 'expired', reason, info)
end

-- It may have arrived and must not be sent twice. If it can be looked up and was not yet,
-- it is, a while later: Voucherify takes its time to show what it has taken.
local function doubt(x, event, place, reason, info, look_up_ms)
  -- Longer with each attempt, up to five times: each is two calls.
  local due = now_ms + math.floor(look_up_ms * math.min(5, 1 + x.a / 4))
  local can = x.v == 0 and string.sub(event.delivery, 1, 7) == 'verify:'
  if not can or due > x.r + event.ttl then
    bury(x, event, 'ambiguous', reason, info)
    return
  end
  -- From when it was taken, for there may have been a call before that Redis has
  -- forgotten; and not from later than the call, if the clock has stepped back since.
  x.v = math.min(x.r, now_ms, tonumber(call('HGET', P .. ':sent', place) or now_ms))
  x.a = x.a + 1
  note('doubted', 1)
  postpone(x, due)
end
