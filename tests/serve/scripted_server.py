"""`python scripted_server.py SECONDS`: a server over a scripted engine, for tests of signals."""

import sys

from scripted_engine import ScriptedEngine
from serving import BYTES, NAME

from k2jax.serve import lifecycle
from k2jax.serve.service import ModelCard, Service


def say(line):
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


engine = ScriptedEngine(BYTES, lambda request: BYTES.encode("a" * 100), seconds=float(sys.argv[1]))
card = ModelCard((NAME,), BYTES, BYTES.vocab, 4096)
bound = lifecycle.bind("127.0.0.1", 0)
service = Service(engine, card, log=say)
lifecycle.run(service, bound, lambda: say(bound.getsockname()[1]))
engine.close()
say("ended")
