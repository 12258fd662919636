"""Everything that touches Ray's own interfaces: the embedded cluster, connections, private imports."""
