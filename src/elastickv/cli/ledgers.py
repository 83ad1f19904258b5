"""The choice of a ledger, under the name that the verbs know it by."""

from elastickv.ledgers import device_names, no_ledger_text, open_chosen_ledger

__all__ = ["device_names", "no_ledger_text", "open_chosen_ledger"]
