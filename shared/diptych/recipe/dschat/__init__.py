"""From DeepSpeed-Chat's command lines to recipes: `flags` is the table, `command` reads, `convert` decides, `account`
tells and writes."""
