"""cuattn from inside other frameworks; each module is imported only when it is asked for."""
