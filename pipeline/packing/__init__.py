"""Which tokens share a segment, which segments share a group, and which group comes when."""
