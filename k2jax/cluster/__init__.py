"""One run in many processes: how they find each other, agree, and notice that one is gone.

`detect` says which process this is, `group` connects it with the others, `preflight` compares them
before anything is compiled, `member` is all of that for one command. The processes of a run talk
over one plain connection each to process 0, which is closed by the kernel when a process dies:
jax's own service would end the others by a crash, a minute or more later.
"""

from k2jax.cluster.detect import Place, add_arguments, find
from k2jax.cluster.group import Group, current
from k2jax.cluster.join import member
from k2jax.cluster.rendezvous import EXIT_RETRY, Lost

__all__ = ["EXIT_RETRY", "Group", "Lost", "Place", "add_arguments", "current", "find", "member"]
