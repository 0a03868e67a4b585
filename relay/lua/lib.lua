-- Shared by all scripts: put in front of each of them, after its `#!lua` line.
--
-- KEYS  1 the prefix with its hash tag, for example {relay}
-- Every key is that prefix and a suffix, so all of them share one hash slot: the
-- one declared key routes the script, and a Cluster runs it unchanged.
local P, call = KEYS[1], redis.call
local clock = call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now_ms = math.floor(now_us / 1000)

local LANES = {'high', 'normal', 'low'}
-- Every stream with events in it. `retry` holds events in flight only; behind a lane
-- are events of customers who have another one in flight.
local STREAMS = {'high', 'normal', 'low', 'retry', 'high:behind', 'normal:behind',
  'low:behind'}
local OUTCOMES = {
  'delivered', 'rejected', 'expired', 'ambiguous', 'invalid', 'unauthenticated',
  'forbidden', 'rate_limited', 'duplicate', 'coalesced', 'dropped', 'internal',
}
local MINUTES_KEPT_MS, HOURS_KEPT_MS = 72 * 3600000, 400 * 86400000
-- Names come from browsers: without a bound, one page could fill Redis with them.
local NAMES_KEPT, NAMES_SHOWN, FIELDS_MAX, NAME_BYTES = 1000, 200, 4096, 64

local streams = {}
local function stream(lane)
  local key = streams[lane]
  if not key then key = P .. ':q:' .. lane; streams[lane] = key end
  return key
end

-- Civil date of a Unix day, proleptic Gregorian (H. Hinnant, "chrono-Compatible
-- Low-Level Date Algorithms"); scripts have no os.date.
local function stamp(seconds)
  local days = math.floor(seconds / 86400)
  local rest = seconds - days * 86400
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524)
    - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d%02d%02d%02d%02d', year, month, day,
    math.floor(rest / 3600), math.floor(rest % 3600 / 60))
end

-- A whole number for a command. As a number it would be written with the digits of a
-- fraction in mind, which takes longer than most commands.
local format = string.format
local function text(n) return n == 1 and '1' or format('%d', n) end

-- Counts are gathered while the script runs and written once at its end.
local totals, windows = {}, {}
local function count(field, n)  -- since ever, this minute and this hour
  totals[field] = (totals[field] or 0) + n
  windows[field] = (windows[field] or 0) + n
end
local function note(field, n)  -- this minute and this hour only
  windows[field] = (windows[field] or 0) + n
end

-- The name to count an event under: its own while it is in the catalogue or among the
-- most frequent, else `other`. Space-saving (Metwally et al. 2005) over NAMES_KEPT candidates.
local function label(full, n)
  local name = full
  if #name > NAME_BYTES then  -- cut before a whole character, told apart by a digest
    name = string.gsub(string.sub(name, 1, NAME_BYTES), '[\192-\255][\128-\191]*$', '')
      .. '~' .. string.sub(redis.sha1hex(full), 1, 8)
  end
  if call('SISMEMBER', P .. ':catalog', full) == 1 then return name end
  local key = P .. ':names'
  local known = tonumber(call('ZSCORE', key, name) or 0)
  local kept = call('ZCARD', key)
  if n > 0 then
    if known == 0 and kept >= NAMES_KEPT then
      local least = call('ZPOPMIN', key)
      call('ZADD', key, text(least[2] + n), name)
    else
      call('ZINCRBY', key, text(n), name)
    end
  end
  -- The first one that is not shown; whoever is only as frequent is not either, and
  -- a newcomer inherits a count that is not its own: else a flood of names that are
  -- seen once would show in turns.
  local shown = kept < NAMES_SHOWN
  if not shown then
    local at = text(NAMES_SHOWN)
    local beyond = call('ZREVRANGE', key, at, at, 'WITHSCORES')
    shown = known > tonumber(beyond[2] or 0)
  end
  return shown and name or 'other'
end
local fields_of = {}  -- by an event's name: its label, and by outcome its field
local function count_event(name, outcome, n, fresh)
  local fields = fields_of[name]
  if not fields then
    fields = {label(name, fresh or 0)}
    fields_of[name] = fields
  end
  local field = fields[outcome]
  if not field then
    field = 'event:' .. fields[1] .. ':' .. outcome
    fields[outcome] = field
  end
  note(field, n)
end

local function write_window(key, kept_ms)
  local fresh = false
  for field, n in pairs(windows) do
    if call('HINCRBY', key, field, text(n)) == n then fresh = true end
  end
  if not fresh then return end
  call('PEXPIRE', key, kept_ms)
  if call('HLEN', key) <= FIELDS_MAX then return end
  for field, n in pairs(windows) do  -- full: this script's names become `other`
    local outcome = string.match(field, '^event:.*:([a-z_]+)$')
    if outcome and field ~= 'event:other:' .. outcome then
      if call('HINCRBY', key, field, -n) == 0 then call('HDEL', key, field) end
      call('HINCRBY', key, 'event:other:' .. outcome, n)
    end
  end
end
local function write_counts()
  for field, n in pairs(totals) do call('HINCRBY', P .. ':totals', field, text(n)) end
  if not next(windows) then return end
  local when = stamp(tonumber(clock[1]))
  write_window(P .. ':minute:' .. when, MINUTES_KEPT_MS)
  write_window(P .. ':hour:' .. string.sub(when, 1, 10), HOURS_KEPT_MS)
end

-- An event in the queue is one packed array: {id, name, customer, delivery, ttl_ms,
-- lane, body}. `customer` is a keyed digest, never the id itself. `delivery` is
-- `at_least_once`, `at_most_once`, or `verify:` with the property of metadata that names
-- the event in Voucherify. One that a replay made
-- has three more: the id of the event it repeats, the replay, and its part of that. One
-- that is coalesced has, in their place, the digest of its name and the window in ms.
local function open(blob)
  local e = cmsgpack.unpack(blob)
  local event = {id = e[1], name = e[2], customer = e[3], delivery = e[4], ttl = e[5],
    lane = e[6], body = e[7]}
  if #e == 10 then
    event.replay_of, event.run, event.chunk = e[8], e[9], e[10]
  elseif #e == 9 then
    event.digest, event.window = e[8], e[9]
  end
  return event
end
-- One customer's events of one name, where they are coalesced. While one waits:
--   id  of the event whose place they have in the queue
--   e   the event that came last, packed, and r when; none while that is the same one
-- After it was sent `until`, in ms, alone; gone when the window is over. No end is set
-- while one waits: a hold may last for weeks.
local function coalesce_key(event)
  return P .. ':coalesce:' .. event.customer .. ':' .. event.digest
end
-- The id says when it was received, or when it died. After a step back of the clock it
-- cannot, as ids never go back: then it is the last one plus one.
local now_id = string.format('%d-*', now_ms)  -- once, for it is made for each event
local function add(key, ...)
  local added = redis.pcall('XADD', key, now_id, ...)
  if type(added) == 'table' then call('XADD', key, '*', ...) end
end
local function append(lane, ...) add(stream(lane), ...) end
-- How many more events may wait.
local function room_of(queue_max)
  local room = queue_max - call('ZCARD', P .. ':delayed')
  for _, name in ipairs(STREAMS) do room = room - call('XLEN', stream(name)) end
  return room
end
-- What is known of an event beside itself: r received_ms, a attempts, s strikes, k the
-- count of successes when a hold last met it (-1: never), d forwarders that died with
-- it, v from when on it is to be looked for in Voucherify before anything else, in ms
-- (0: nowhere). A first-time entry has only `e`; when it was received is its own id.
local KNOWN = {'r', 'a', 's', 'k', 'd', 'v'}
local function fresh(packed, received_ms)
  return {e = packed, r = tonumber(received_ms), a = 0, s = 0, k = -1, d = 0, v = 0}
end
-- Back into the queue, to be claimed at `due`; the other half is tick's read_due.
local function postpone(x, due)
  local packed = {x.e}
  for _, name in ipairs(KNOWN) do packed[#packed + 1] = x[name] end
  call('ZADD', P .. ':delayed', due, cmsgpack.pack(packed))
end

-- What stands for a sender's id in a key, for somebody may put a name into it; the same
-- as queue.py has it.
local sha1hex = redis.sha1hex
local function id_digest(id) return string.sub(sha1hex(id), 1, 20) end

-- A replay goes on by what became of the events that it has sent.
local function tell_replay(event, told)
  local key = P .. ':replay'
  if not event.run or call('HGET', key, 'run') ~= event.run then return end
  local failed = told.outcome ~= 'delivered' and told.outcome ~= 'dropped'
  call('HINCRBY', key, told.outcome, 1)
  if failed then
    call('HINCRBY', key, 'failed:' .. told.outcome .. ':' .. told.reason, 1)
  end
  if tonumber(call('HGET', key, 'chunk')) == event.chunk then
    call('HINCRBY', key, failed and 'chunk_failed' or 'chunk_passed', 1)
  end
end

-- Somebody who waits for this event's outcome (Prefer: wait) is told.
local function tell(event, told)
  tell_replay(event, told)
  told.replay_of = event.replay_of
  local key = P .. ':wait:' .. event.customer .. ':' .. id_digest(event.id)
  if call('EXISTS', key) == 0 then return end
  call('DEL', key)
  call('RPUSH', key .. ':outcome', cjson.encode(told))
  call('PEXPIRE', key .. ':outcome', 60000)
end
