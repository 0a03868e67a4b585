#!lua flags=allow-oom
-- Look at dead letters, or drop them, some entries at a time: called until it returns
-- no cursor. Their outcomes stay counted, whatever becomes of them here.
--
-- KEYS  1 prefix
-- ARGV  1 what  2 filter, packed: letters.lua  3 cursor, empty for the first call
--       4 how many entries to look at
--   count  what a replay would do  5 RELAY_TTL in ms  6 new ttl in ms, 0 for none
--          7 "1": ambiguous ones too
--          Reply packed {cursor, {{outcome, reason, event, obstacle or '', n}...}};
--          an id that is not there has the obstacle `gone`
--   list   newest first, without bodies  5 how many at most
--          Reply packed {cursor, {{entry id, {field, value...}}...}}
--   drop   5 how many at most
--          Reply packed {cursor, how many are gone}
local what, filter = ARGV[1], read_filter(ARGV[2])
local cursor, size = ARGV[3], tonumber(ARGV[4])

local function count_letters()
  local default_ttl_ms, new_ttl_ms = tonumber(ARGV[5]), tonumber(ARGV[6])
  local groups, index = {}, {}
  local function add(outcome, reason, event, why)
    local key = table.concat({outcome, reason, event, why}, '\0')
    if not index[key] then
      groups[#groups + 1] = {outcome, reason, event, why, 0}
      index[key] = groups[#groups]
    end
    index[key][5] = index[key][5] + 1
  end
  local found, ended = walk(filter, cursor, size)
  for _, at in ipairs(found) do
    local letter = at[3] and named(at[3])
    if not letter then
      add('', '', '', 'gone')
    elseif is_wanted(letter, filter) then
      add(letter.outcome or '', letter.reason or '', letter.event or '',
        obstacle(letter, default_ttl_ms, new_ttl_ms, ARGV[7] == '1') or '')
    end
  end
  return {ended and '' or found[#found][1], groups}
end

-- XRANGE backwards; with ids they are few, and their order is the caller's.
local function newest()
  if #filter.ids > 0 then return walk(filter, cursor, size) end
  local to = cursor == '' and filter.to or '(' .. cursor
  local found = {}
  for i, item in ipairs(call('XREVRANGE', DEAD, to, filter.from, 'COUNT', size)) do
    found[i] = {item[1], item[1], item[2]}
  end
  return found, #found < size
end

local function list_letters()
  local most, letters, last = tonumber(ARGV[5]), {}, ''
  local found, ended = newest()
  for _, at in ipairs(found) do
    if #letters >= most then
      ended = false
      break
    end
    last = at[1]
    if at[3] and is_wanted(named(at[3]), filter) then
      local fields = {}
      for i = 1, #at[3], 2 do
        if at[3][i] ~= 'body' then
          fields[#fields + 1] = at[3][i]
          fields[#fields + 1] = at[3][i + 1]
        end
      end
      letters[#letters + 1] = {at[2], fields}
    end
  end
  return {ended and '' or last, letters}
end

local function drop_letters()
  local most, gone, last = tonumber(ARGV[5]), 0, cursor
  local found, ended = walk(filter, cursor, size)
  for _, at in ipairs(found) do
    if gone >= most then
      ended = true
      break
    end
    last = at[1]
    if at[3] and is_wanted(named(at[3]), filter) then
      gone = gone + call('XDEL', DEAD, at[2])
    end
  end
  if gone > 0 then note('dead_letters_dropped', gone) end
  write_counts()
  return {ended and '' or last, gone}
end

if what == 'count' then
  return cmsgpack.pack(count_letters())
elseif what == 'list' then
  return cmsgpack.pack(list_letters())
end
return cmsgpack.pack(drop_letters())
