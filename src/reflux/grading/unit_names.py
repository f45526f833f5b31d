"""Names of units, so that answers in different units are not taken for equal.

Only names in this table are compared. Any other word after a number ("18 apples") is ignored.
"""

from __future__ import annotations

import re

CURRENCIES = {"$": "dollar", "\u20ac": "euro", "\u00a3": "pound-sterling", "\u00a5": "yen", "\u20b9": "rupee"}
# The first name of each line is the name that is compared.
TABLE = """
mm millimeter millimeters millimetre millimetres
cm centimeter centimeters centimetre centimetres
m meter meters metre metres
km kilometer kilometers kilometre kilometres
in inch inches
ft foot feet
yd yard yards
mi mile miles
mg milligram milligrams
g gram grams
kg kilogram kilograms
lb lbs pound pounds
oz ounce ounces
ml milliliter milliliters millilitre millilitres mL
l liter liters litre litres L
s sec secs second seconds
min mins minute minutes
h hr hrs hour hours
day days
week weeks
month months
year years yr yrs
cent cents
dollar dollars USD $
euro euros EUR €
pound-sterling £
yen ¥
rupee rupees ₹
degree degrees deg °
"""
CANONICAL = {name: line.split()[0] for line in TABLE.strip().splitlines() for name in line.split()}
COMPOUND = {"mph": "mi / h", "kmh": "km / h", "kph": "km / h", "sq": "square", "cu": "cubic"}
SHORT = re.compile(rf"\b({'|'.join(COMPOUND)})\b\.?")
NAMES = "|".join(sorted((re.escape(name) for name in (*CANONICAL, "mph")), key=len, reverse=True))
TOKEN = re.compile(r"[^\W\d_]+|°|\^\s*\{?\s*-?\d\s*\}?|/|\S")
RAISED = {"square": "2", "cubic": "3"}


def unit_of(words: str) -> str | None:
    """The unit in one spelling: "kilometers per hour" and "km/h" give the same. None for words that are not
    wholly made of known units.
    """
    if not words or words.isspace():
        return None
    words = SHORT.sub(lambda found: COMPOUND[found[1]], words)
    parts: list[str] = []
    power = ""
    for token in TOKEN.findall(words.replace("\\cdot", " ").replace("*", " ")):
        if token in ("/", "per"):
            parts.append("/")
        elif token[0] == "^" and parts:
            parts[-1] += "^" + re.sub(r"[^-\d]", "", token)
        elif token in RAISED:
            power = "^" + RAISED[token]
        elif token in CANONICAL:
            parts.append(CANONICAL[token] + power)
            power = ""
        else:
            return None
    return " ".join(parts) or None
