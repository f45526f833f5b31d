"""Contexts: the parts that define which prompt the teacher sees."""

CONTEXTS = {
    "same": "reflux.contexts.same:Same",
    "peers": "reflux.contexts.peers:Peers",
    "replay": "reflux.contexts.replay:Replay",
    "privileged": "reflux.contexts.privileged:Privileged",
}
