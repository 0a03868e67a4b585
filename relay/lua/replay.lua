#!lua flags=allow-oom
-- Replay dead letters: each is taken out and appended to its lane as a new event in
-- one step, so it is in one of the two places whatever dies when. It is received anew,
-- keeps its delivery rule and, unless told otherwise, the end of its time to live.
--
-- One replay at a time: who runs it holds a lease, and another may take over when that
-- is out. All it needs to go on is in the hash, so a lost answer is read again (`keep`).
--
-- KEYS  1 prefix
-- ARGV  1 what  2 replay  3 who runs it
--   begin   4 plan, for whoever goes on with it  5 filter, packed: letters.lua
--           6 how many it will send
--   resume  the last one, unless it is done; 2 is ''
--   send    4 number of this step  5 "1" to begin a new part  6 filter
--           7 packed {how many at most, entries to look at, RELAY_TTL in ms, new ttl in
--           ms or 0, ambiguous ones too, queue_max, ms from a doubtful call to its look-up}
--   keep    the lease
--   pass    the canary is alive: from now on in larger parts
--   end     4 done | stopped  5 why
-- Reply the hash as a flat list; {"busy", ms} while somebody else runs one; {"none"}
--       when there is nothing to resume; {"lost"} when it is not theirs any more
local LEASE_MS = 10000
-- How long it is known that a letter was replayed, for another one of the same event.
local MARK_MS = 30 * 86400000

local key = P .. ':replay'
local what, run, owner = ARGV[1], ARGV[2], ARGV[3]

local function value(field) return call('HGET', key, field) end
local function state()  -- and what runs is leased for longer
  local running = value('state') == 'running'
  call('HSET', key, 'owner', owner, 'lease_ms', running and now_ms + LEASE_MS or 0)
  return call('HGETALL', key)
end
local function lease_left()
  if value('owner') == owner then return 0 end
  local left = tonumber(value('lease_ms') or 0) - now_ms
  return left <= LEASE_MS and left or 0  -- longer: the clock has stepped back
end

local function next_chunk()
  call('HINCRBY', key, 'chunk', 1)
  call('HSET', key, 'chunk_sent', 0, 'chunk_passed', 0, 'chunk_failed', 0)
end

local function begin()
  if value('run') == run then return state() end  -- the answer was lost
  local filter = read_filter(ARGV[5])
  -- What dies from now on is not part of it, above all what it has sent itself.
  local newest = call('XREVRANGE', DEAD, filter.to, filter.from, 'COUNT', 1)
  call('DEL', key)
  call('HSET', key, 'run', run, 'plan', ARGV[4], 'planned', ARGV[6],
    'last', newest[1] and newest[1][1] or '', 'state', 'running', 'why', '',
    'phase', 'canary', 'cursor', '', 'ended', newest[1] and '0' or '1', 'full', '0',
    'seq', 0, 'sent', 0, 'chunk', 0, 'started_ms', now_ms)
  next_chunk()
  return state()
end

local function resume()
  local was = value('state')
  if not was or was == 'done' then return {'none'} end
  if value('why') == 'failed' then  -- and may be cured: another canary shows it
    call('HSET', key, 'phase', 'canary')
    next_chunk()
  end
  call('HSET', key, 'state', 'running', 'why', '', 'full', '0')
  return state()
end

-- 1 to 64 of A-Za-z0-9_- that no other event has: the old id and the letter's own.
local function new_id(letter, entry_id)
  local ms, seq = string.match(entry_id, '^(%d+)-(%d+)$')
  local suffix = string.format('-r%x-%s', tonumber(ms), seq)
  local root = letter.id
  if (letter.replay_of or '') ~= '' then
    root = string.gsub(root, '%-r%x+%-%d+$', '')
  end
  return string.sub(root, 1, 64 - #suffix) .. suffix
end

-- Dead of a question that has no answer: to put it again is of no use.
local LOOKED_UP = {look_up_incomplete = true, look_up_impossible = true,
  look_up_needs_server_api = true}

local function revive(entry_id, letter, default_ttl_ms, new_ttl_ms, chunk, look_up_ms)
  local ttl_ms = new_ttl_ms
  if ttl_ms == 0 then ttl_ms = deadline(letter, default_ttl_ms) - now_ms end
  local packed = cmsgpack.pack({new_id(letter, entry_id), letter.event, letter.customer,
    letter.delivery, ttl_ms, letter.lane, letter.body, letter.id, run, chunk})
  call('XDEL', DEAD, entry_id)
  call('SET', replayed_key(letter), '', 'PX', MARK_MS)
  -- One that can be looked up is, also where a person says that it may pay twice, and
  -- not before Voucherify shows what it has taken.
  local doubted = letter.outcome == 'ambiguous' and not LOOKED_UP[letter.reason]
    and string.sub(letter.delivery, 1, 7) == 'verify:'
  if doubted then
    local x = fresh(packed, now_ms)
    x.v = math.min(now_ms, tonumber(letter.doubted_ms) or tonumber(letter.received_ms))
    postpone(x, math.max(now_ms, string.match(entry_id, '^%d+') + look_up_ms))
  else
    append(letter.lane, 'e', packed)
  end
  count('received', 1)
  note('replayed', 1)
  count_event(letter.event, 'received', 1, 1)
end

local function send()
  local most, size, default_ttl_ms, new_ttl_ms, may_pay_twice, queue_max, look_up_ms =
    unpack(cmsgpack.unpack(ARGV[7]))
  local filter = read_filter(ARGV[6])
  if #filter.ids == 0 then filter.to = value('last') end
  if ARGV[5] == '1' then next_chunk() end
  local chunk, room = tonumber(value('chunk')), room_of(queue_max)
  local cursor, sent, full = value('cursor'), 0, false
  local found, ended = walk(filter, cursor, size)
  for _, at in ipairs(found) do
    local letter = at[3] and named(at[3])
    local why = not letter and 'gone'
    if letter and is_wanted(letter, filter) then
      why = obstacle(letter, default_ttl_ms, new_ttl_ms, may_pay_twice) or ''
    end
    full = why == '' and sent >= room
    if full or (why == '' and sent >= most) then
      ended = false
      break
    end
    cursor = at[1]
    if why == '' then
      revive(at[2], letter, default_ttl_ms, new_ttl_ms, chunk, look_up_ms)
      sent = sent + 1
    elseif why then
      call('HINCRBY', key, 'skipped:' .. why, 1)
    end
  end
  call('HINCRBY', key, 'sent', sent)
  call('HINCRBY', key, 'chunk_sent', sent)
  call('HSET', key, 'cursor', cursor, 'ended', ended and '1' or '0',
    'full', full and '1' or '0')
  write_counts()
end

if what == 'begin' or what == 'resume' then
  local left = lease_left()
  if left > 0 then return {'busy', tostring(left)} end
  return what == 'begin' and begin() or resume()
end
if value('owner') ~= owner or value('run') ~= run then return {'lost'} end
if what == 'send' and value('seq') == ARGV[4] then
  call('HINCRBY', key, 'seq', 1)
  send()
elseif what == 'pass' then
  call('HSET', key, 'phase', 'sending')
elseif what == 'end' then
  call('HSET', key, 'state', ARGV[4], 'why', ARGV[5], 'ended_ms', now_ms)
  if ARGV[4] == 'done' then call('HDEL', key, 'plan') end
end
return state()
