"""The waist: records that probes write and that fits, decisions and reports read. Never imports torch."""
