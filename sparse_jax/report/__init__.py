"""Reports on finished runs: what they gave, as tables, figures and a page. Reads workdirs, trains nothing."""
