"""Steps: the parts joined to the engine. Papers compose them; none of them knows a paper."""
