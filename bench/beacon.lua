-- What wrk sends: beacons as the snippet makes them, each of its own id.
--
-- Arguments after `--`: kind, nonce of the run, first person, file of tokens or "-".
-- Kinds  json       one event, application/json
--        text       one event, text/plain: what a page sends without a preflight
--        token      one event with a signed token, each of another customer
--        batch      20 events of one customer
--        bad_origin one event from a page that may not send
--        limited    one event, always from the same address and customer
--
-- Addresses and customers go round in a cycle so long that no limit refuses, for each
-- of them is checked: a million at 120 and 60 a minute are far above any rate here.
local PEOPLE = 1000000
local BATCH = 20

local kind, nonce, first, tokens, n = 'json', '', 0, {}, 0
local head

function init(args)
  kind, nonce, first = args[1], args[2], tonumber(args[3])
  if args[4] ~= '-' then
    for line in io.lines(args[4]) do tokens[#tokens + 1] = line end
  end
  local origin = kind == 'bad_origin' and 'https://elsewhere.example' or 'https://shop.example'
  local content = kind == 'text' and 'text/plain;charset=UTF-8' or 'application/json'
  head = 'POST ' .. wrk.path .. ' HTTP/1.1\r\nHost: ' .. wrk.host .. ':' .. wrk.port
    .. '\r\nOrigin: ' .. origin
    .. '\r\nContent-Type: ' .. content
    .. '\r\nReferer: https://shop.example/cart'
    .. '\r\nUser-Agent: Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0'
    .. '\r\nAccept: */*\r\nAccept-Language: en-GB,en;q=0.5'
    .. '\r\nX-Forwarded-For: '
end

local function event(customer)
  n = n + 1
  return '{"event":"cart_abandoned","id":"' .. nonce .. '-' .. string.format('%010d', n)
    .. '","customer":{"source_id":"' .. customer
    .. '"},"metadata":{"value":49.9,"currency":"EUR","items":3,"page":"/cart/checkout/step-2",'
    .. '"sku":"TSHIRT-GREEN-XL","coupon":"SUMMER-2026"}'
end

function request()
  local person = 1
  if kind == 'batch' then
    person = (first + n / BATCH) % PEOPLE  -- another for each request, not each event
  elseif kind ~= 'limited' then
    person = (first + n) % PEOPLE
  end
  local address = '10.' .. math.floor(person / 65536) .. '.'
    .. math.floor(person / 256) % 256 .. '.' .. person % 256
  local body
  if kind == 'batch' then
    local events = {}
    for i = 1, BATCH do events[i] = event('shopper-' .. person) .. '}' end
    body = '{"events":[' .. table.concat(events, ',') .. ']}'
  elseif kind == 'token' then
    local token = tokens[(first + n) % #tokens + 1]
    n = n + 1
    body = '{"event":"cart_abandoned","id":"' .. nonce .. '-' .. string.format('%010d', n)
      .. '","token":"' .. token
      .. '","metadata":{"value":49.9,"currency":"EUR","items":3,"page":"/cart/checkout/step-2",'
      .. '"sku":"TSHIRT-GREEN-XL","coupon":"SUMMER-2026"}}'
  else
    body = event('shopper-' .. person) .. '}'
  end
  return head .. address .. '\r\nContent-Length: ' .. #body .. '\r\n\r\n' .. body
end

function done(summary, latency)
  io.write(string.format(
    '\nRESULT {"requests":%d,"microseconds":%d,"connect":%d,"read":%d,"write":%d,'
      .. '"timeout":%d,"status":%d,"p50":%d,"p99":%d,"max":%d}\n',
    summary.requests, summary.duration, summary.errors.connect, summary.errors.read,
    summary.errors.write, summary.errors.timeout, summary.errors.status,
    latency:percentile(50), latency:percentile(99), latency.max))
end
