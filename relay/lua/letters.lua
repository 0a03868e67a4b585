-- Shared by the scripts for dead letters: put in front of them, behind lib.lua.
local DEAD = P .. ':dead'
local WHERE = {high = true, normal = true, low = true}
local WHOLE = {'id', 'event', 'customer', 'delivery', 'received_ms', 'lane', 'body'}

-- Which letters are meant, packed {outcome, reason, event, {customer digest...}, from,
-- to, {entry id...}}: '' and no digest for any, from and to as XRANGE takes them.
local function read_filter(packed)
  local f = cmsgpack.unpack(packed)
  local customers = {}
  for _, digest in ipairs(f[4]) do customers[digest] = true end
  return {outcome = f[1], reason = f[2], event = f[3], customers = customers,
    from = f[5], to = f[6], ids = f[7]}
end

local function is_wanted(letter, filter)
  for _, part in ipairs({'outcome', 'reason', 'event'}) do
    if filter[part] ~= '' and letter[part] ~= filter[part] then return false end
  end
  return not next(filter.customers) or filter.customers[letter.customer] == true
end

-- The next `size` entries, oldest first, as {cursor behind it, entry id, fields}, and
-- whether these were the last. An id that is gone has no fields.
local function walk(filter, cursor, size)
  local found, ids = {}, filter.ids
  if #ids > 0 then
    local start = tonumber(cursor) or 0
    for i = start + 1, math.min(start + size, #ids) do
      local entries = call('XRANGE', DEAD, ids[i], ids[i])
      found[#found + 1] = {tostring(i), ids[i], entries[1] and entries[1][2]}
    end
    return found, start + size >= #ids
  end
  local from = cursor == '' and filter.from or '(' .. cursor
  for i, item in ipairs(call('XRANGE', DEAD, from, filter.to, 'COUNT', size)) do
    found[i] = {item[1], item[1], item[2]}
  end
  return found, #found < size
end

local function named(fields)
  local letter = {}
  for i = 1, #fields, 2 do letter[fields[i]] = fields[i + 1] end
  return letter
end

local function replayed_key(letter)
  return P .. ':replayed:' .. letter.customer .. ':' .. id_digest(letter.id)
end

-- Until when it may be delivered. Letters of an older version do not say it: then as
-- the setting has it now.
local function deadline(letter, default_ttl_ms)
  local ttl_ms = tonumber(letter.ttl_ms) or default_ttl_ms
  return tonumber(letter.received_ms) + ttl_ms
end

-- Why a letter cannot be replayed; nil when it can.
local function obstacle(letter, default_ttl_ms, new_ttl_ms, may_pay_twice)
  for _, part in ipairs(WHOLE) do
    if not letter[part] then return 'unreadable' end
  end
  if not WHERE[letter.lane] or not tonumber(letter.received_ms) then
    return 'unreadable'
  end
  if letter.outcome == 'ambiguous' and not may_pay_twice then return 'ambiguous' end
  if new_ttl_ms == 0 and now_ms >= deadline(letter, default_ttl_ms) then
    return 'too_old'
  end
  if call('EXISTS', replayed_key(letter)) == 1 then return 'same_id' end
  return nil
end
