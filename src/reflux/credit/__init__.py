"""Credit rules: they decide how much each position counts. The protocol is in `base.py`."""

CREDIT = {
    "prefix": "reflux.credit.prefix:Prefix",
    "position": "reflux.credit.position:Position",
    "group_advantage": "reflux.credit.group_advantage:GroupAdvantage",
    "release": "reflux.credit.release:Release",
    "margin": "reflux.credit.margin:Margin",
    "freshness": "reflux.credit.freshness:Freshness",
    "balance": "reflux.credit.balance:Balance",
    "discrepancy": "reflux.credit.discrepancy:Discrepancy",
    "sign_gate": "reflux.credit.sign_gate:SignGate",
    "unlikely": "reflux.credit.unlikely:Unlikely",
}
