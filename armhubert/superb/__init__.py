"""SUPERB, natively: frozen upstreams, SUPERB's heads, metrics and settings. `evaluate` in `runner` is the way in."""
