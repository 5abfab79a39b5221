"""The checker of signatures under test: beartype, with int where float is."""

import beartype

check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
