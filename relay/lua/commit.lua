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
--       4 requests, packed {{ip digest, {{id, given, customer digest, name, lane,
--         delivery, ttl_ms, body, special}...}}...}; `given`: the sender chose the
--         id; `special` nil or {name digest, coalesce_ms, quota, period_ms, dry_run,
--         token digest, uses, life_ms, dry_run}: what is counted for this event alone
--       5 refusals of the edge, packed {{outcome, reason, name, n}...}; without an
--         outcome the reason is a counter's name, with `browser` one of the day's
-- Reply packed {{dimension, remaining, reset_us, {code, wait_us...}}...}, one for
--       each request: the tightest limit (-1: none), and for each event 0 queued,
--       1 duplicate, 2 no room, 3+d over limit d (from 0), -1 queued in the place of
--       one that waited (coalesced), -2 its token is used up, -3 over the event's own limit. "STALE" for a straggler.
local SLOT_MS = 3600000  -- longer than any relay goes on trying one commit
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
local requests = cmsgpack.unpack(ARGV[4])
local dims = settings[3]
local dedupe_ms = string.format('%d', settings[2])  -- text, for a number is made one

-- A limit's arrival times are a hash by whom it counts, which costs a third of a key
-- for each. It has no end for each either: when it is as old as a time can matter, it
-- becomes the one before, which is read as well, and that one goes.
local function limit_key(d) return P .. ':limit:' .. dims[d][1] end
local function limit_before(d) return P .. ':limit:' .. dims[d][1] .. ':before' end
local function whom(d, ip, customer)
  if dims[d][1] == 'ip' then return ip end
  if dims[d][1] == 'customer' then return customer end
  return 'all'
end
local tat, dirty = {}, {}  -- by limit, then by whom
for d = 1, #dims do
  local names, known, changed = {}, {}, {}
  for _, request in ipairs(requests) do
    for _, event in ipairs(request[2]) do
      local name = whom(d, request[1], event[3])
      if not known[name] then names[#names + 1] = name; known[name] = now_us end
    end
  end
  local longest = now_us + dims[d][3] + RATE_CLAMP_US
  for from = 1, #names, MOST_ARGS do
    local to = math.min(from + MOST_ARGS - 1, #names)
    local young = call('HMGET', limit_key(d), unpack(names, from, to))
    local old = call('HMGET', limit_before(d), unpack(names, from, to))
    for i = from, to do
      local name, value = names[i], young[i - from + 1] or old[i - from + 1]
      local stored = value and tonumber(value) or 0
      if stored > longest then  -- kept so, or the next look would meet it again
        known[name], changed[name] = longest, true
      elseif stored > now_us then
        known[name] = stored
      end
    end
  end
  tat[d], dirty[d] = known, changed
end
-- Where times are written: in a hash that was begun no longer ago than they can matter.
local function begin_limit(d)
  local key = limit_key(d)
  local span_ms = math.ceil((dims[d][3] + RATE_CLAMP_US) / 1000)
  local since = tonumber(call('HGET', key, '') or now_ms - span_ms)
  if since <= now_ms and now_ms - since < span_ms then return key end
  if since <= now_ms and call('EXISTS', key) == 1 then
    call('UNLINK', limit_before(d))
    call('RENAME', key, limit_before(d))
  end
  call('HSET', key, '', now_ms)
  call('PEXPIRE', key, 2 * span_ms)
  return key
end
local function write_limit(d)
  if not next(dirty[d]) then return end
  local key, fields = begin_limit(d), {}
  for name in pairs(dirty[d]) do
    fields[#fields + 1] = name
    fields[#fields + 1] = string.format('%d', tat[d][name])
    if #fields >= MOST_ARGS then
      call('HSET', key, unpack(fields))
      fields = {}
    end
  end
  if #fields > 0 then call('HSET', key, unpack(fields)) end
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

local function admit(request_ip, event)
  local id, given, customer, name, lane, delivery, ttl_ms, body, special = unpack(event)
  local packed = {id, name, customer, delivery, ttl_ms, lane, body}
  if room <= 0 then note('no_room', 1) return 2, 0 end
  local wait, refuser = 0, 0
  for d = 1, #dims do
    local over = tat[d][whom(d, request_ip, customer)] + dims[d][2] - now_us - dims[d][3]
    if over > 0 and dims[d][4] then
      note('would_refuse:' .. dims[d][1], 1)
    elseif over > wait then
      wait, refuser = over, d
    end
  end
  count('received', 1)
  count_event(name, 'received', 1, 1)
  if refuser > 0 then
    refuse(name, 'rate_limited', 'rate_limited_' .. dims[refuser][1])
    return 2 + refuser, wait
  end
  local seen = P .. ':seen:' .. customer .. ':' .. id_digest(id)  -- another's is not taken
  local seen_ms = given and dedupe_ms or MADE_ID_MS
  local charges, place, kept
  if special then
    -- Before what it may have used up itself: who sends an event again because the
    -- answer was lost must not hear that its token is spent.
    if given and call('EXISTS', seen) == 1 then
      count('duplicate', 1)
      count_event(name, 'duplicate', 1)
      return 1, 0
    end
    if special[2] > 0 then
      packed[8], packed[9] = special[1], special[2]
      place = {id = id, name = name, customer = customer, lane = lane, ttl = ttl_ms,
        digest = special[1], window = special[2]}
      kept = call('HMGET', coalesce_key(place), 'id', 'until', 'e')
      if kept[1] then
        call('SET', seen, '', 'PX', seen_ms)
        local older = kept[3] and open(kept[3]) or {id = kept[1], customer = customer}
        take_place(cmsgpack.pack(packed), place, older)
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
  for d = 1, #dims do
    local name = whom(d, request_ip, customer)
    local charged = tat[d][name] + dims[d][2]
    if charged - now_us <= dims[d][3] then  -- not over
      tat[d][name], dirty[d][name] = charged, true
    end
  end
  if place then
    open_place(cmsgpack.pack(packed), place, kept[2])
  else
    append(lane, 'e', cmsgpack.pack(packed))
  end
  room = room - 1
  return 0, 0
end

local function tightest(request)
  local least, which, reset = -1, -1, 0
  local first = request[2][1]
  for d = 1, #dims do
    if not dims[d][4] then
      local free = now_us + dims[d][3] - tat[d][whom(d, request[1], first[3])]
      local left = math.max(0, math.floor(free / dims[d][2]))
      if which < 0 or left < least then
        local full = left * dims[d][2] >= dims[d][3]
        least, which, reset = left, d - 1, full and 0 or dims[d][2] - free % dims[d][2]
      end
    end
  end
  return which, least, reset
end

local reply = {}
for r, request in ipairs(requests) do
  local codes = {}
  for _, event in ipairs(request[2]) do
    local code, wait = admit(request[1], event)
    codes[#codes + 1] = code
    codes[#codes + 1] = wait
  end
  local which, least, reset = tightest(request)
  reply[r] = {which, least, reset, codes}
end
for d = 1, #dims do write_limit(d) end
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
call('SET', slot, seq .. ' ' .. packed, 'PX', SLOT_MS)
return packed
