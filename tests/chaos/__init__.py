"""Chaos: tenants are killed, stopped and starved while somebody who trusts none of them watches (docs/faults.md)."""
