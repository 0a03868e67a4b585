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
local MADE_ID_MS = '120000'  -- how long an id of the relay's own making is known
local RATE_CLAMP_US = 5000000  -- a clock that stepped back blocks nobody for longer
local MOST_ARGS = 4000  -- unpack has a limit near 8,000

local slot, seq = P .. ':commit:' .. ARGV[1], tonumber(ARGV[2])
local last = call('GET', slot)
if last then
  local done, reply = string.match(last, '^(%d+) (.*)$')
  if tonumber(done) == seq then return reply end
  if tonumber(done) > seq then return redis.error_reply('STALE commit') end
end

local settings = cmsgpack.unpack(ARGV[3])
local limits = #settings[3]
local dedupe_ms = text(settings[2])

-- What each event says, by its number, and the last event of each request. Tables and
-- strings are most of what a commit costs: nothing is made here that is not needed.
local byte, unpack_limit = string.byte, cmsgpack.unpack_limit
local ip, given, special, packed = {}, {}, {}, {}
local id, name, customer, ttl, lane = {}, {}, {}, {}, {}
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
    local n, who, from, delivery
    at, n, who = unpack_limit(blob, 2, at + (byte(blob, at + 1) == 0xdc and 3 or 1))
    for _ = 1, n do
      e = e + 1
      ip[e] = who
      from, given[e], special[e] = unpack_limit(blob, 2, at)
      at, id[e], name[e], customer[e], delivery, ttl[e], lane[e] =
        unpack_limit(blob, 6, from + 1)
      at = string_end(blob, at)  -- the body's
      packed[e] = string.sub(blob, from + 1, at)
    end
    last_of[#last_of + 1] = e
  end
  return e
end
local events = read_requests(ARGV[4])

-- A limit's arrival times are a hash by whom it counts, which costs a third of a key
-- for each. It has no end for each either: when it is as old as a time can matter, it
-- becomes the one before, which is read as well, and that one goes. All this is by limit.
local key, before, emission, tolerance, dry = {}, {}, {}, {}, {}
local line = {}  -- how far ahead a time may be now
local began = {}  -- when the hash did, in ms
local names, times, changed = {}, {}, {}  -- by place; the first place is `began`'s
local place = {}  -- by event
for d, limit in ipairs(settings[3]) do
  key[d] = P .. ':limit:' .. limit[1]
  before[d] = P .. ':limit:' .. limit[1] .. ':before'
  emission[d], tolerance[d], dry[d] = limit[2], limit[3], limit[4]
  line[d] = now_us + limit[3]
  local whom = limit[1] == 'ip' and ip or limit[1] == 'customer' and customer
  local places, count, known, time, cut, at = {}, 1, {''}, {}, {}, {}
  for e = 1, events do
    local who = whom and whom[e] or 'all'
    local i = places[who]
    if not i then count = count + 1; i = count; places[who], known[i] = i, who end
    at[e] = i
  end
  local longest = line[d] + RATE_CLAMP_US
  for from = 1, count, MOST_ARGS do
    local to = math.min(from + MOST_ARGS - 1, count)
    local young, old = call('HMGET', key[d], unpack(known, from, to)), nil
    if from == 1 then began[d] = tonumber(young[1] or nil) end
    for i = math.max(from, 2), to do
      local value = young[i - from + 1]
      if not value then
        old = old or call('HMGET', before[d], unpack(known, from, to))
        value = old[i - from + 1]
      end
      local stored = value and tonumber(value) or 0
      if stored > longest then  -- kept so, or the next look would meet it again
        stored, cut[i] = longest, true
      end
      time[i] = stored > now_us and stored or now_us
    end
  end
  names[d], times[d], changed[d], place[d] = known, time, cut, at
end
-- Times are written to a hash that was begun no longer ago than they can matter.
local function begin_limit(d)
  local span_ms = math.ceil((tolerance[d] + RATE_CLAMP_US) / 1000)
  local since = began[d] or now_ms - span_ms
  if since <= now_ms and now_ms - since < span_ms then return end
  if since <= now_ms and call('EXISTS', key[d]) == 1 then
    call('UNLINK', before[d])
    call('RENAME', key[d], before[d])
  end
  call('HSET', key[d], '', now_ms)
  call('PEXPIRE', key[d], 2 * span_ms)
end
local function write_limit(d)
  if not next(changed[d]) then return end
  begin_limit(d)
  local fields, n = {}, 0
  for i = 2, #names[d] do
    if changed[d][i] then
      fields[n + 1], fields[n + 2] = names[d][i], text(times[d][i])
      n = n + 2
      if n >= MOST_ARGS then
        call('HSET', key[d], unpack(fields))
        fields, n = {}, 0
      end
    end
  end
  if n > 0 then call('HSET', key[d], unpack(fields)) end
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
  local id, name, customer, lane = id[e], name[e], customer[e], lane[e]
  local given, special, packed = given[e], special[e], packed[e]
  if room <= 0 then note('no_room', 1) return 2, 0 end
  local wait, refuser = 0, 0
  for d = 1, limits do
    charged[d] = times[d][place[d][e]] + emission[d]
    local over = charged[d] - line[d]
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
  local seen = P .. ':seen:' .. customer .. ':' .. id_digest(id)  -- another's is not taken
  local seen_ms = given and dedupe_ms or MADE_ID_MS
  local charges, coalesced, kept
  if special then
    -- Before what it may have used up itself: who sends an event again because the
    -- answer was lost must not hear that its token is spent.
    if given and call('EXISTS', seen) == 1 then
      count('duplicate', 1)
      count_event(name, 'duplicate', 1)
      return 1, 0
    end
    if special[2] > 0 then
      local parts = cmsgpack.unpack(packed)
      parts[8], parts[9] = special[1], special[2]
      packed = cmsgpack.pack(parts)
      coalesced = {id = id, name = name, customer = customer, lane = lane,
        ttl = ttl[e], digest = special[1], window = special[2]}
      kept = call('HMGET', coalesce_key(coalesced), 'id', 'until', 'e')
      if kept[1] then
        call('SET', seen, '', 'PX', seen_ms)
        local older = kept[3] and open(kept[3]) or {id = kept[1], customer = customer}
        take_place(packed, coalesced, older)
        return -1, 0
      end
    end
    local code, more = meet(special, customer, name)
    if code then return code, more end
    charges = more
  end
  if not given then
    -- Made once, so never a duplicate itself; but after a 503 whose result nobody
    -- knew, its sender may repeat it under the id that the answer told.
    call('SET', seen, '', 'PX', seen_ms)
  elseif not call('SET', seen, '', 'PX', seen_ms, 'NX') then
    count('duplicate', 1)
    count_event(name, 'duplicate', 1)
    return 1, 0
  end
  if charges then
    for _, charge in ipairs(charges) do charge() end
  end
  for d = 1, limits do
    if charged[d] <= line[d] then  -- not over
      local i = place[d][e]
      times[d][i], changed[d][i] = charged[d], true
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
      local free = line[d] - times[d][place[d][e]]
      local part = free % emission[d]
      local left = (free - part) / emission[d]
      if left < 0 then left = 0 end
      if which < 0 or left < least then
        least, which = left, d - 1
        reset = left * emission[d] >= tolerance[d] and 0 or emission[d] - part
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
local browser_day = P .. ':browser:' .. string.sub(stamp(tonumber(clock[1])), 1, 8)
for _, refusal in ipairs(cmsgpack.unpack(ARGV[5])) do
  local outcome, reason, name, n = unpack(refusal)
  if outcome == '' then
    note(reason, n)
  elseif outcome == 'browser' then
    call('HINCRBY', browser_day, reason, n)
    call('PEXPIRE', browser_day, HOURS_KEPT_MS)
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
