"""Simulated time for the scripts: each call is handed the time, and keys expire by it.

The scripts run unchanged but for where they read the clock. Redis itself knows only
its own time, so what a script lets expire is written down with its simulated end, and
is deleted by the first script that runs later than that.
"""

from redis.asyncio import Redis

from relay.line import Line
from relay.queue import Script, Scripts

START_MS = 1_800_000_000_000  # a Friday morning in 2027

# Stands where lib.lua has call('TIME'), just behind `local P, call`, and so can put
# itself between the scripts and `call`. A key that is made anew without an end must
# not inherit that of its predecessor, hence the ZREM.
_CLOCK = """(function()
  local us, real, ends = tonumber(table.remove(ARGV)), call, P .. ':simulated:ends'
  local now = math.floor(us / 1000)
  for _, key in ipairs(real('ZRANGEBYSCORE', ends, '-inf', now)) do
    real('DEL', key)
    real('ZREM', ends, key)
  end
  local function set(key, ...)
    local given, kept, life = {...}, {}, nil
    local i = 1
    while i <= #given do
      if given[i] == 'PX' then
        life = tonumber(given[i + 1])
        assert(life > 0, 'invalid expire time')
        i = i + 1
      else
        assert(given[i] ~= 'EX', 'the simulation knows no SET EX')
        kept[#kept + 1] = given[i]
      end
      i = i + 1
    end
    local done = real('SET', key, unpack(kept))
    if done then
      if life then real('ZADD', ends, now + life, key) else real('ZREM', ends, key) end
    end
    return done
  end
  call = function(name, key, ...)
    if name == 'SET' then return set(key, ...) end
    if name == 'PEXPIRE' then
      if real('EXISTS', key) == 0 then return 0 end
      real('ZADD', ends, now + ..., key)
      return 1
    end
    if name == 'PTTL' then
      local at = real('ZSCORE', ends, key)
      return at and at - now or -1
    end
    assert(not string.find(name, 'EXPIRE', 1, true), 'the simulation knows no ' .. name)
    if name == 'DEL' then real('ZREM', ends, key, ...) end
    return real(name, key, ...)
  end
  return {math.floor(us / 1000000), us % 1000000}
end)()"""


class Clock:
    """The time of a simulation, and what Redis believes it to be."""

    def __init__(self) -> None:
        self.now_ms = START_MS
        self.off_ms = 0  # how far Redis' clock has stepped from it

    @property
    def server_us(self) -> int:
        return (self.now_ms + self.off_ms) * 1000


class SimulatedScripts(Scripts):
    """The scripts, each called with the time of a simulation as its last argument."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock=_CLOCK)
        for name, script in list(vars(self).items()):
            setattr(self, name, _Timed(script, clock))


class _Timed(Script):
    def __init__(self, script: Script, clock: Clock) -> None:
        self.source, self.sha, self._clock = script.source, script.sha, clock

    async def __call__(self, client: Redis, prefix: str, *args: object) -> object:
        return await super().__call__(client, prefix, *args, self._clock.server_us)

    async def on(self, line: Line, prefix: str, *args: str | bytes | int) -> object:
        return await super().on(line, prefix, *args, self._clock.server_us)
