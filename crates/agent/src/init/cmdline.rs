//! The kernel command line: which of its words concern the agent.

use tracing::level_filters::LevelFilter;

/// What the command line asks of the agent. Words that are somebody else's are left alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandLine {
    /// `agent.log=<level>`: how much is written to the console.
    pub log: LevelFilter,
    /// `agent.server_addr=<address>`: serve there too.
    pub server_address: Option<String>,
    /// `agent.debug_console`: a shell on the console.
    pub debug_console: bool,
    /// `systemd.unified_cgroup_hierarchy=<switch>`: control groups version 2, or 1 when it is off.
    pub unified_cgroups: bool,
    /// Words for the agent that were not understood, to be named in the log.
    pub misunderstood: Vec<String>,
}

impl Default for CommandLine {
    fn default() -> Self {
        Self {
            log: LevelFilter::WARN,
            server_address: None,
            debug_console: false,
            unified_cgroups: true,
            misunderstood: Vec::new(),
        }
    }
}

impl CommandLine {
    /// Reads a command line. What stands after `--` is for process 1's arguments and not looked at.
    pub fn parse(text: &str) -> Self {
        let mut known = Self::default();
        for word in text.split_ascii_whitespace().take_while(|word| *word != "--") {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            let understood = match key {
                "agent.log" => value.to_ascii_lowercase().parse().map(|level| known.log = level).is_ok(),
                "agent.server_addr" => {
                    known.server_address = Some(value.to_owned());
                    !value.is_empty()
                }
                "agent.debug_console" => parse_switch(value).map(|on| known.debug_console = on).is_some(),
                "systemd.unified_cgroup_hierarchy" => {
                    parse_switch(value).map(|on| known.unified_cgroups = on).is_some()
                }
                _ => true,
            };
            if !understood {
                known.misunderstood.push(word.to_owned());
            }
        }
        known
    }
}

/// A switch is on by its name alone or by a truth value.
fn parse_switch(value: &str) -> Option<bool> {
    match value {
        "" | "1" | "true" | "yes" | "on" => Some(true),
        "0" | "false" | "no" | "off" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_the_agent_are_found_among_others() {
        let line =
            CommandLine::parse("console=ttyS0 agent.log=debug quiet agent.debug_console agent.server_addr=unix://@x");
        assert_eq!(line.log, LevelFilter::DEBUG);
        assert!(line.debug_console);
        assert_eq!(line.server_address.as_deref(), Some("unix://@x"));
        assert!(line.misunderstood.is_empty());
    }

    #[test]
    fn a_value_that_makes_no_sense_is_named_and_changes_nothing() {
        let line = CommandLine::parse("agent.log=loud agent.debug_console=perhaps -- agent.log=trace");
        assert_eq!(line.log, LevelFilter::WARN);
        assert!(!line.debug_console);
        assert_eq!(line.misunderstood, ["agent.log=loud", "agent.debug_console=perhaps"]);
    }

    proptest::proptest! {
        #[test]
        fn any_line_is_survived(line: String) {
            let _ = CommandLine::parse(&line);
        }
    }
}
