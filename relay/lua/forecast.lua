#!lua flags=allow-oom
-- Say what was forecast, where dashboards read it and the forwarders obey it.
--
-- KEYS  1 prefix
-- ARGV  1 gauges, packed as a flat list of names and values  2 paces, the same
call('HSET', P .. ':gauges', unpack(cmsgpack.unpack(ARGV[1])))
call('HSET', P .. ':pace', unpack(cmsgpack.unpack(ARGV[2])))
return 1
