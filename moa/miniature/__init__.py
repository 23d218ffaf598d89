"""The miniature world: rendered avatars whose identity, context and masks are exactly known."""
