"""Contexts: the parts that define which prompt the teacher sees."""

CONTEXTS = {
    "same": "reflux.contexts.same:Same",
    "peers": "reflux.contexts.peers:Peers",
    "privileged": "reflux.contexts.privileged:Privileged",
}
