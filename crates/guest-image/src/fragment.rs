//! Kernel configuration fragments: `CONFIG_NAME=value   # reason`, one option a line, never without its reason.
//!
//! `CONFIG_OLD|CONFIG_NEW=y` is an option that newer kernels call otherwise; `CONFIG_OLD|gone=y` one that newer kernels
//! don't have because they always do it.

use std::collections::{BTreeMap, BTreeSet};

use crate::{Error, Result};

/// The options that the small kernel asks for.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Options {
    wishes: Vec<Wish>,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Wish {
    /// One of them will be known to the kernel.
    names: Vec<String>,
    /// Or none may be.
    gone: bool,
    value: String,
}

impl Options {
    /// Adds a fragment's options. A later fragment may change what an earlier one asked for; one fragment may name an
    /// option once.
    pub(crate) fn add(&mut self, file: &str, text: &str) -> Result<()> {
        let mut own: Vec<Wish> = Vec::new();
        let mut known = BTreeSet::new();
        for (number, line) in (1..).zip(text.lines()) {
            let bad = |why: String| Error::Fragment { file: file.to_owned(), line: number, why };
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (left, rest) = line
                .split_once('=')
                .filter(|(left, _)| left.split('|').all(|name| is_name(name) || name == "gone"))
                .ok_or_else(|| bad(format!("Expected CONFIG_NAME=value  # reason, found: {line}")))?;
            let (value, reason) = split_value(rest).ok_or_else(|| bad(format!("{left} has no readable value")))?;
            let reason = reason.strip_prefix('#').map(str::trim).unwrap_or_default();
            if reason.is_empty() {
                return Err(bad(format!("{left} has no reason; write it after a #")));
            }
            let (gone, names): (Vec<&str>, Vec<&str>) = left.split('|').partition(|name| *name == "gone");
            let names: Vec<String> = names.into_iter().map(str::to_owned).collect();
            if let Some(twice) = names.iter().find(|name| !known.insert((*name).clone())) {
                return Err(bad(format!("{twice} is set twice")));
            }
            own.push(Wish { names, gone: !gone.is_empty(), value: value.to_owned() });
        }
        self.wishes.retain(|wish| !wish.names.iter().any(|name| known.contains(name)));
        self.wishes.extend(own);
        Ok(())
    }

    /// The form that `make allnoconfig` takes by KCONFIG_ALLCONFIG; it passes over names it doesn't know.
    pub(crate) fn kconfig(&self) -> String {
        let lines = self.wishes.iter().flat_map(|wish| wish.names.iter().map(|name| line(name, &wish.value) + "\n"));
        lines.collect()
    }

    /// Compares with the `.config` that came out: what was asked for and is not so.
    pub(crate) fn check(&self, resolved: &str) -> Result<()> {
        let set: BTreeMap<&str, &str> =
            resolved.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once('=')).collect();
        // Kconfig writes no line for an option whose parent is off or that it doesn't have, and a comment for one that
        // could be set and isn't.
        let off: BTreeSet<&str> =
            resolved.lines().filter_map(|line| line.strip_prefix("# ")?.strip_suffix(" is not set")).collect();
        let wrong = self.wishes.iter().filter(|wish| {
            let is_so = |name: &String| set.get(name.as_str()) == Some(&wish.value.as_str());
            let is_absent = |name: &String| !set.contains_key(name.as_str());
            if wish.value == "n" {
                !wish.names.iter().all(is_absent)
            } else {
                let unknown = wish.names.iter().all(|name| is_absent(name) && !off.contains(name.as_str()));
                !(wish.names.iter().any(is_so) || wish.gone && unknown)
            }
        });
        let lines: Vec<String> = wrong.map(|wish| format!("{}={}", wish.names.join("|"), wish.value)).collect();
        if lines.is_empty() { Ok(()) } else { Err(Error::ConfigNotTaken { lines }) }
    }
}

fn line(name: &str, value: &str) -> String {
    if value == "n" { format!("# {name} is not set") } else { format!("{name}={value}") }
}

fn is_name(name: &str) -> bool {
    name.strip_prefix("CONFIG_")
        .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_'))
}

/// A value (a quoted string or one word) and the trimmed rest of the line.
fn split_value(rest: &str) -> Option<(&str, &str)> {
    let end = match rest.strip_prefix('"') {
        Some(quoted) => quoted.find('"')? + 2,
        None => rest.find(char::is_whitespace).unwrap_or(rest.len()),
    };
    let (value, rest) = rest.split_at(end);
    (!value.is_empty() && !value.starts_with('#')).then_some((value, rest.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        Options::default().add("x.config", text).unwrap_err().to_string()
    }

    #[test]
    fn a_line_without_reason_is_refused() {
        assert_eq!(error("\nCONFIG_A=y\n"), "x.config, line 2: CONFIG_A has no reason; write it after a #");
        assert!(error("CONFIG_A=y #\n").contains("no reason"));
        assert!(error("CONFIG_A y # r").contains("line 1"));
        assert!(error("CONFIG_A= # r").contains("no readable value"));
        assert!(error("CONFIG_A=y # r\nCONFIG_A=n # r").contains("twice"));
    }

    #[test]
    fn values_of_all_kinds() {
        let mut options = Options::default();
        options
            .add("a", "# head\nCONFIG_A=y  # r\nCONFIG_B=n # r\nCONFIG_C=\"a # b\"  # r\nCONFIG_D=-1 # r\n")
            .unwrap();
        options.add("b", "CONFIG_A=n # changed\n").unwrap();
        assert_eq!(
            options.kconfig(),
            "# CONFIG_B is not set\nCONFIG_C=\"a # b\"\nCONFIG_D=-1\n# CONFIG_A is not set\n"
        );
    }

    #[test]
    fn an_option_may_have_another_name_or_be_gone() {
        let mut options = Options::default();
        options.add("a", "CONFIG_OLD|CONFIG_NEW=y # r\nCONFIG_ALWAYS|gone=y # r\n").unwrap();
        assert_eq!(options.kconfig(), "CONFIG_OLD=y\nCONFIG_NEW=y\nCONFIG_ALWAYS=y\n");
        options.check("CONFIG_OLD=y\nCONFIG_ALWAYS=y\n").unwrap();
        options.check("CONFIG_NEW=y\n").unwrap();
        let Err(Error::ConfigNotTaken { lines }) = options.check("# CONFIG_ALWAYS is not set\n") else {
            panic!("taken")
        };
        assert_eq!(lines, ["CONFIG_OLD|CONFIG_NEW=y", "CONFIG_ALWAYS=y"]);
    }

    #[test]
    fn what_was_not_taken_is_listed() {
        let mut options = Options::default();
        options.add("a", "CONFIG_A=y # r\nCONFIG_B=n # r\nCONFIG_C=5 # r\nCONFIG_D=y # r\n").unwrap();
        options.check("CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=5\nCONFIG_D=y\n").unwrap();
        let error = options.check("CONFIG_A=y\nCONFIG_B=y\nCONFIG_C=6\n# CONFIG_D is not set\n").unwrap_err();
        let Error::ConfigNotTaken { lines } = error else { panic!("{error}") };
        assert_eq!(lines, ["CONFIG_B=n", "CONFIG_C=5", "CONFIG_D=y"]);
    }
}
