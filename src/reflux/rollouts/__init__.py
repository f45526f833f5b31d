"""How a text attempt comes about: turns are generated, an environment answers, until the attempt is finished."""
