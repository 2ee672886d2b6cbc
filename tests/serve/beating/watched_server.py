"""`jaxserve serve`, with a window: lines of JSON on standard input are answered on standard output.

    {"ask": "stats"}             the engine's own counters
    {"ask": "pace", "s": 0.01}   from now on each step takes so much longer, as on a device that is slower than the toy
    {"ask": "break", "how": …}   the next step "raises", or "hangs" for ever

The command line, the lifecycle and the socket are the product's own; only `jaxserve.build.build` is wrapped, for a handle on
what it returns.
"""

import dataclasses
import json
import sys
import threading
import time

import jaxserve.build

_build = jaxserve.build.build


def build(config):
    built = _build(config)
    threading.Thread(target=_answer, args=(built,), daemon=True).start()
    return built


def _answer(built):
    pace_s, fault, wait = 0.0, None, built.runner.wait

    def watched_wait(handle):
        time.sleep(pace_s)
        if fault == "raises":
            raise RuntimeError("canary: the device is gone")
        while fault == "hangs":
            time.sleep(60)
        return wait(handle)

    built.runner.wait = watched_wait
    for line in sys.stdin:
        command = json.loads(line)
        match command["ask"]:
            case "pace":
                pace_s = command["s"]
            case "break":
                fault = command["how"]
        sys.stdout.write(json.dumps(dataclasses.asdict(built.client.stats())) + "\n")
        sys.stdout.flush()


jaxserve.build.build = build

if __name__ == "__main__":
    from serve.cli import main

    main()
