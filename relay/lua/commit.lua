#!lua
-- Take a batch of requests into the queue: limits, room, dedupe, append, count.
-- A refused event charges nothing and leaves nothing but its counters; times that a
-- clock which stepped back left too far ahead are cut whatever comes of it. A commit takes effect at
-- most once, however often it is sent: the last reply of each slot is kept, so a
-- repeat after a lost answer gets the first answer, and a late straggler nothing.
--
-- KEYS  1 prefix
-- ARGV  1 slot (writer and lane of the writer)  2 sequence number in that slot
--       3 settings, packed {queue_max, dedupe_ms, {{dimension, emission_us,
--         tolerance_us, dry_run}...}}
--       4 requests, one after the other, each packed {n, ip digest, given, special,
--         event, given, special, event...}: n events, each as it waits in the queue
--         (lib.lua), so that it need not be packed again; `given`: the sender chose
--         the id; `special` nil or {name digest, coalesce_ms, quota, period_ms, dry_run,
--         token digest, uses, life_ms, dry_run}: what is counted for this event alone
--       5 refusals of the edge, packed {{outcome, reason, name, n}...}; without an
--         outcome the reason is a counter's name, with `browser` one of the day's
-- Reply packed {{dimension, remaining, reset_us, {code, wait_us...}}...}, one for
--       each request: the tightest limit (-1: none), and for each event 0 queued,
--       1 duplicate, 2 no room, 3+d over limit d (from 0), -1 queued in the place of
--       one that waited (coalesced), -2 its token is used up, -3 over the event's own limit. "STALE" for a straggler.
local SLOT_MS = '3600000'  -- longer than any relay goes on trying one commit
local MADE_ID_MS = 120000  -- how long an id of the relay's own making is known
local RATE_CLAMP_US = 5000000  -- a clock that stepped back blocks nobody for longer
local MOST_ARGS = 4000  -- even, for pairs; unpack has a limit near 8,000

local slot, seq = P .. ':commit:' .. ARGV[1], tonumber(ARGV[2])
local last = call('GET', slot)
if last then
  local done, reply = string.match(last, '^(%d+) (.*)$')
  if tonumber(done) == seq then return reply end
  if tonumber(done) > seq then return redis.error_reply('STALE commit') end
end

local settings = cmsgpack.unpack(ARGV[3])
local limits = #settings[3]
local dedupe_ms = settings[2]

-- What each event says, by its number, and the last event of each request. Tables and
-- strings are most of what a commit costs: nothing is made here that is not needed.
local byte, sub, unpack_limit = string.byte, string.sub, cmsgpack.unpack_limit
local ip, customer, site = {}, {}, {}
local name, lane, packed = {}, {}, {}
local given, special = {}, {}
local mark = {}  -- by which an id is known: the customer's, for another's is not taken
local last_of = {}
local function string_end(blob, at)  -- of the packed string that begins after `at`
  local kind, b1, b2, b3, b4 = byte(blob, at + 1, at + 5)
  if kind < 0xc0 then return at + 1 + kind - 0xa0 end
  if kind == 0xd9 then return at + 2 + b1 end
  if kind == 0xda then return at + 3 + 256 * b1 + b2 end
  return at + 5 + 16777216 * b1 + 65536 * b2 + 256 * b3 + b4
end
local function read_requests(blob)
  local at, size, e = 0, #blob, 0
  while at < size do
    local n, who, from, chosen, more, id, whose
    at, n, who = unpack_limit(blob, 2, at + (byte(blob, at + 1) == 0xdc and 3 or 1))
    for _ = 1, n do
      e = e + 1
      from, chosen, more = unpack_limit(blob, 2, at)
      at, id, name[e], whose, _, _, lane[e] = unpack_limit(blob, 6, from + 1)
      at = string_end(blob, at)  -- the body's
      packed[e] = sub(blob, from + 1, at)
      ip[e], customer[e], site[e] = who, whose, 'all'
      mark[e] = whose .. ':' .. id_digest(id)
      if chosen then given[e] = true end
      if more then special[e] = more end
    end
    last_of[#last_of + 1] = e
  end
  return e
end
local events = read_requests(ARGV[4])

-- Limits and known ids are kept in hashes, for a key with an end of its own costs far
-- more time and memory. One that was begun `span_ms` ago becomes the one before, which
-- is read as well, and so on, until the last of `keys` goes. Under '' is when it began.
local function part(list, first)
  return unpack(list, first, math.min(first + MOST_ARGS - 1, #list))
end
local function read(key, fields, found)
  local began
  for first = 1, #fields, MOST_ARGS do
    local values = call('HMGET', key, part(fields, first))
    if first == 1 then began = tonumber(values[1] or nil) end
    for i = first == 1 and 2 or 1, #values do
      local value = values[i]
      if value then found(first + i - 1, value) end
    end
  end
  return began
end
-- Calls `found` with the place and the value of each of `fields` that is there, the
-- newer one last. The first field is ''.
local function look_up(hash, fields, found)
  local keys = hash.keys
  for i = #keys, 2, -1 do
    if call('EXISTS', keys[i]) == 1 then read(keys[i], fields, found) end
  end
  hash.began = read(keys[1], fields, found)
end
local function write(hash, fields)  -- each with its value behind it
  if #fields == 0 then return end
  local keys, span_ms = hash.keys, hash.span_ms
  local key = keys[1]
  local since = hash.began or now_ms - span_ms
  if since > now_ms or now_ms - since >= span_ms then
    for i = since > now_ms and 1 or #keys, 2, -1 do
      if call('EXISTS', keys[i - 1]) == 1 then
        call('UNLINK', keys[i])
        call('RENAME', keys[i - 1], keys[i])
      end
    end
    call('HSET', key, '', now_ms)
    call('PEXPIRE', key, #keys * span_ms)
  end
  for first = 1, #fields, MOST_ARGS do call('HSET', key, part(fields, first)) end
end

-- Each limit's theoretical arrival times, by whom it counts. All this is by limit.
local arrivals = {}  -- the hash
local emission, tolerance, dry = {}, {}, {}
local line = {}  -- how far ahead a time may be now
local whom = {}  -- by event
local known, had = {}, {}  -- who is here, and the times that need not be written
local times = {}  -- by who
for d, limit in ipairs(settings[3]) do
  local dimension = limit[1]
  arrivals[d] = {
    keys = {P .. ':limit:' .. dimension, P .. ':limit:' .. dimension .. ':before'},
    span_ms = math.ceil((limit[3] + RATE_CLAMP_US) / 1000),  -- a time can matter so long
  }
  emission[d], tolerance[d], dry[d] = limit[2], limit[3], limit[4]
  line[d] = now_us + limit[3]
  local whose = dimension == 'ip' and ip or dimension == 'customer' and customer or site
  local who, n, time, was = {''}, 1, {}, {}
  for e = 1, events do
    local one = whose[e]
    if not time[one] then n = n + 1; who[n], time[one] = one, now_us end
  end
  local longest = line[d] + RATE_CLAMP_US
  look_up(arrivals[d], who, function(i, value)
    local stored = tonumber(value)
    if stored > longest then  -- written back so, or the next look would meet it again
      time[who[i]], was[i] = longest, nil
    else
      if stored < now_us then stored = now_us end
      time[who[i]], was[i] = stored, stored
    end
  end)
  whom[d], known[d], had[d], times[d] = whose, who, was, time
end
local function write_limit(d)
  local who, time, was = known[d], times[d], had[d]
  local fields, n = {}, 0
  local last, as_text  -- whoever comes after a pause has the same time as others
  for i = 2, #who do
    local now = time[who[i]]
    if now ~= (was[i] or now_us) then
      if now ~= last then last, as_text = now, text(now) end
      fields[n + 1], fields[n + 2] = who[i], as_text
      n = n + 2
    end
  end
  write(arrivals[d], fields)
end

-- When ids were taken, in ms: those that senders chose, and apart from them those of the
-- relay's own making, which are forgotten much sooner.
local seen = {
  keys = {P .. ':seen', P .. ':seen:before', P .. ':seen:oldest'},
  window_ms = dedupe_ms, span_ms = math.ceil(dedupe_ms / 2), new = {},
}
local made = {
  keys = {P .. ':made', P .. ':made:before'},
  window_ms = MADE_ID_MS, span_ms = MADE_ID_MS, new = {},
}
local taken = {}  -- by mark
local function look_up_ids()
  local asked = {''}
  for e = 1, events do
    if given[e] then asked[#asked + 1] = mark[e] end
  end
  for _, hash in ipairs({seen, made}) do
    if call('EXISTS', hash.keys[1]) == 1 then
      local since = now_ms - hash.window_ms
      look_up(hash, asked, function(i, value)
        if tonumber(value) > since then taken[asked[i]] = true end
      end)
    end
  end
end
look_up_ids()
local now_text = text(now_ms)
local function know(e)
  local new = (given[e] and seen or made).new
  local n = #new
  new[n + 1], new[n + 2] = mark[e], now_text
  taken[mark[e]] = true
end

local room = room_of(settings[1])

local function refuse(name, outcome, reason)
  count(outcome, 1)
  note('reason:' .. reason, 1)
  count_event(name, outcome, 1)
end

-- What is counted for one event alone. Exact, not a bucket: a bucket of three a day
-- lets five through in one, and here each of them may be points. Nothing is charged
-- yet; returns a code and a wait, or nil and how to charge it.
local function meet(special, customer, name)
  local digest, _, quota, period_ms, limit_dry, token, uses, life_ms, token_dry =
    unpack(special)
  local charges = {}
  if quota > 0 then
    local key = P .. ':rl:event:' .. digest .. ':' .. customer
    local ahead = 0
    -- The clock stepped back: what lies ahead of it now counts as of now.
    while tonumber(call('LINDEX', key, ahead) or 0) > now_ms do
      call('LSET', key, ahead, now_ms)
      ahead = ahead + 1
    end
    if ahead > 0 then call('PEXPIRE', key, period_ms) end
    local oldest = tonumber(call('LINDEX', key, quota - 1) or -period_ms)
    local wait_ms = oldest + period_ms - now_ms
    if wait_ms > 0 and not limit_dry then
      refuse(name, 'rate_limited', 'rate_limited_event')
      return -3, wait_ms * 1000
    end
    if wait_ms > 0 then  -- in dry run as if enforced alone: what is over is not charged
      note('would_refuse:event', 1)
    else
      charges[#charges + 1] = function()
        call('LPUSH', key, now_ms)
        call('LTRIM', key, 0, quota - 1)
        call('PEXPIRE', key, period_ms)
      end
    end
  end
  if uses > 0 then
    local key = P .. ':uses:' .. token
    local spent = tonumber(call('GET', key) or 0) >= uses
    if spent and not token_dry then
      refuse(name, 'unauthenticated', 'token_used_up')
      return -2, 0
    elseif spent then
      note('would_refuse:token', 1)
    else
      charges[#charges + 1] = function()
        call('INCR', key)
        call('PEXPIRE', key, life_ms)
      end
    end
  end
  return nil, charges
end

-- The last one wins: it takes the place of the one that waits, which goes nowhere. That
-- is no call more, so nothing is charged.
local function take_place(packed, event, older)
  call('HSET', coalesce_key(event), 'e', packed, 'r', now_ms)
  count('coalesced', 1)
  count_event(event.name, 'coalesced', 1)
  tell(older, {outcome = 'coalesced', reason = 'coalesced'})
end
-- The next ones will take the place of this one. Where another was sent within the
-- window, it waits for the end of that.
local function open_place(packed, event, until_ms)
  local key = coalesce_key(event)
  call('DEL', key)
  call('HSET', key, 'id', event.id)
  -- A clock that stepped back makes nobody wait for longer, nor a window that is longer
  -- than an event lives.
  local due = math.min(tonumber(until_ms or 0), now_ms + event.window,
    now_ms + event.ttl / 2)
  if due > now_ms then
    postpone(fresh(packed, now_ms), due)
  else
    append(event.lane, 'e', packed)
  end
end

local charged = {}  -- by limit
local function admit(e)
  local name, customer, lane, packed = name[e], customer[e], lane[e], packed[e]
  local given, special = given[e], special[e]
  if room <= 0 then note('no_room', 1) return 2, 0 end
  local wait, refuser = 0, 0
  for d = 1, limits do
    local time = times[d][whom[d][e]] + emission[d]
    local over = time - line[d]
    charged[d] = time
    if over > 0 and dry[d] then
      note('would_refuse:' .. settings[3][d][1], 1)
    elseif over > wait then
      wait, refuser = over, d
    end
  end
  count('received', 1)
  count_event(name, 'received', 1, 1)
  if refuser > 0 then
    refuse(name, 'rate_limited', 'rate_limited_' .. settings[3][refuser][1])
    return 2 + refuser, wait
  end
  -- Before what it may have used up itself: who sends an event again because the
  -- answer was lost must not hear that its token is spent.
  if given and taken[mark[e]] then
    count('duplicate', 1)
    count_event(name, 'duplicate', 1)
    return 1, 0
  end
  local charges, coalesced, kept
  if special then
    if special[2] > 0 then
      local parts = cmsgpack.unpack(packed)
      parts[8], parts[9] = special[1], special[2]
      packed = cmsgpack.pack(parts)
      coalesced = {id = parts[1], name = name, customer = customer, lane = lane,
        ttl = parts[5], digest = special[1], window = special[2]}
      kept = call('HMGET', coalesce_key(coalesced), 'id', 'until', 'e')
      if kept[1] then
        know(e)
        local older = kept[3] and open(kept[3]) or {id = kept[1], customer = customer}
        take_place(packed, coalesced, older)
        return -1, 0
      end
    end
    local code, more = meet(special, customer, name)
    if code then return code, more end
    charges = more
  end
  -- One of our own making too: it is no duplicate itself, but after a 503 whose result
  -- nobody knew, its sender may repeat it under the id that the answer told.
  know(e)
  if charges then
    for _, charge in ipairs(charges) do charge() end
  end
  for d = 1, limits do
    if charged[d] <= line[d] then  -- not over
      times[d][whom[d][e]] = charged[d]
    end
  end
  if coalesced then
    open_place(packed, coalesced, kept[2])
  else
    append(lane, 'e', packed)
  end
  room = room - 1
  return 0, 0
end

local function tightest(e)
  local least, which, reset = -1, -1, 0
  for d = 1, limits do
    if not dry[d] then
      local emission = emission[d]
      local free = line[d] - times[d][whom[d][e]]
      local part = free % emission
      local left = (free - part) / emission
      if left < 0 then left = 0 end
      if which < 0 or left < least then
        least, which = left, d - 1
        reset = left * emission >= tolerance[d] and 0 or emission - part
      end
    end
  end
  return which, least, reset
end

local reply, first = {}, 1
for r, last in ipairs(last_of) do
  local codes, n = {}, 0
  for e = first, last do
    codes[n + 1], codes[n + 2] = admit(e)
    n = n + 2
  end
  local which, least, reset = tightest(first)
  reply[r] = {which, least, reset, codes}
  first = last + 1
end
for d = 1, limits do write_limit(d) end
write(seen, seen.new)
write(made, made.new)
for _, refusal in ipairs(cmsgpack.unpack(ARGV[5])) do
  local outcome, reason, name, n = unpack(refusal)
  if outcome == '' then
    note(reason, n)
  elseif outcome == 'browser' then
    local day = P .. ':browser:' .. sub(stamp(tonumber(clock[1])), 1, 8)
    call('HINCRBY', day, reason, n)
    call('PEXPIRE', day, HOURS_KEPT_MS)
  else
    count('received', n)
    count(outcome, n)
    note('reason:' .. reason, n)
  end
  if name ~= '' then
    count_event(name, 'received', n, n)
    count_event(name, outcome, n)
  end
end
write_counts()
local packed = cmsgpack.pack(reply)
call('SET', slot, ARGV[2] .. ' ' .. packed, 'PX', SLOT_MS)
return packed
