"""Read, not imported, by who asks what is known."""


def register_in_tasks_manager(name, *tasks):
    return lambda made: made


@register_in_tasks_manager("llama", *["text-generation", "text-generation-with-past"])
class Llama:
    pass
