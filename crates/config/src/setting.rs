//! How each type of setting is read, checked, described and written back.

use std::path::PathBuf;
use std::time::Duration;

use crate::value::Value;

/// What a value must keep to beyond its type.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Rule {
    /// The type says it all.
    Any,
    /// A number in this range, ends included; for a duration in seconds.
    Between(f64, f64),
    /// Letters, digits and `_ . , = + -`: what goes into one argument of another program as it is.
    Plain,
    /// No control characters.
    Printable,
}

/// A type that a key may have.
pub(crate) trait Setting: Sized {
    /// What the key takes, for errors and `kata config explain`: "an integer from 1 to 16".
    fn wanted(rule: Rule) -> String;
    /// The value, when it is of this type and keeps the rule.
    fn read(value: &Value, rule: Rule) -> Option<Self>;
    /// The value as a file would say it.
    fn write(&self) -> Value;
    /// An annotation's text as a value of this type, unchecked.
    fn parse(text: &str) -> Value {
        Value::Text(text.to_owned())
    }
}

/// A range, said without fractions where it has none.
fn range(rule: Rule) -> String {
    match rule {
        Rule::Between(low, high) => format!(" from {low} to {high}"),
        Rule::Any | Rule::Plain | Rule::Printable => String::new(),
    }
}

fn keeps(number: f64, rule: Rule) -> bool {
    match rule {
        Rule::Between(low, high) => number >= low && number <= high,
        Rule::Any | Rule::Plain | Rule::Printable => true,
    }
}

fn text_keeps(text: &str, rule: Rule) -> bool {
    match rule {
        Rule::Plain => text.chars().all(|c| c.is_ascii_alphanumeric() || "_.,=+-".contains(c)),
        Rule::Any | Rule::Printable | Rule::Between(..) => !text.chars().any(char::is_control),
    }
}

impl Setting for bool {
    fn wanted(_: Rule) -> String {
        "true or false".into()
    }
    fn read(value: &Value, _: Rule) -> Option<Self> {
        if let Value::Bool(value) = value { Some(*value) } else { None }
    }
    fn write(&self) -> Value {
        Value::Bool(*self)
    }
    fn parse(text: &str) -> Value {
        text.parse().map_or_else(|_| Value::Text(text.to_owned()), Value::Bool)
    }
}

impl Setting for u32 {
    fn wanted(rule: Rule) -> String {
        format!("an integer{}", range(rule))
    }
    fn read(value: &Value, rule: Rule) -> Option<Self> {
        let Value::Int(value) = value else { return None };
        u32::try_from(*value).ok().filter(|value| keeps(f64::from(*value), rule))
    }
    fn write(&self) -> Value {
        Value::Int(i64::from(*self))
    }
    fn parse(text: &str) -> Value {
        text.parse().map_or_else(|_| Value::Text(text.to_owned()), Value::Int)
    }
}

impl Setting for f64 {
    fn wanted(rule: Rule) -> String {
        format!("a number{}", range(rule))
    }
    fn read(value: &Value, rule: Rule) -> Option<Self> {
        let number = match value {
            Value::Float(number) => *number,
            // Small enough to be exact: a larger one is out of every range.
            Value::Int(number) => f64::from(i32::try_from(*number).ok()?),
            _ => return None,
        };
        (number.is_finite() && keeps(number, rule)).then_some(number)
    }
    fn write(&self) -> Value {
        Value::Float(*self)
    }
    fn parse(text: &str) -> Value {
        text.parse().map_or_else(|_| Value::Text(text.to_owned()), Value::Float)
    }
}

impl Setting for String {
    fn wanted(rule: Rule) -> String {
        match rule {
            Rule::Plain => "a string of letters, digits and _ . , = + -".into(),
            Rule::Any | Rule::Printable | Rule::Between(..) => "a string without control characters".into(),
        }
    }
    fn read(value: &Value, rule: Rule) -> Option<Self> {
        if let Value::Text(text) = value { text_keeps(text, rule).then(|| text.clone()) } else { None }
    }
    fn write(&self) -> Value {
        Value::Text(self.clone())
    }
}

impl Setting for PathBuf {
    fn wanted(_: Rule) -> String {
        "an absolute path without `..`".into()
    }
    fn read(value: &Value, rule: Rule) -> Option<Self> {
        let path = PathBuf::from(String::read(value, rule)?);
        let climbs = path.components().any(|part| part == std::path::Component::ParentDir);
        (path.is_absolute() && !climbs).then_some(path)
    }
    fn write(&self) -> Value {
        Value::Text(self.to_string_lossy().into_owned())
    }
}

impl Setting for Option<PathBuf> {
    fn wanted(_: Rule) -> String {
        "an absolute path without `..`, or \"\" for none".into()
    }
    fn read(value: &Value, rule: Rule) -> Option<Self> {
        match value {
            Value::Text(text) if text.is_empty() => Some(None),
            _ => PathBuf::read(value, rule).map(Some),
        }
    }
    fn write(&self) -> Value {
        self.as_ref().map_or_else(|| Value::Text(String::new()), PathBuf::write)
    }
}

impl Setting for Vec<String> {
    fn wanted(_: Rule) -> String {
        "an array of strings".into()
    }
    fn read(value: &Value, rule: Rule) -> Option<Self> {
        let Value::List(values) = value else { return None };
        values.iter().map(|value| String::read(value, rule)).collect()
    }
    fn write(&self) -> Value {
        Value::List(self.iter().map(String::write).collect())
    }
    fn parse(text: &str) -> Value {
        let parts = text.split(';').map(str::trim).filter(|part| !part.is_empty());
        Value::List(parts.map(|part| Value::Text(part.to_owned())).collect())
    }
}

impl Setting for Duration {
    fn wanted(rule: Rule) -> String {
        match rule {
            Rule::Between(low, high) => {
                format!("a time from {low} s to {high} s: \"30s\", \"500ms\", \"2m\", or seconds")
            }
            Rule::Any | Rule::Plain | Rule::Printable => "a time: \"30s\", \"500ms\", \"2m\", or seconds".into(),
        }
    }
    fn read(value: &Value, rule: Rule) -> Option<Self> {
        let time = match value {
            Value::Int(seconds) => Duration::from_secs(u64::try_from(*seconds).ok()?),
            Value::Text(text) => time(text)?,
            _ => return None,
        };
        keeps(time.as_secs_f64(), rule).then_some(time)
    }
    fn write(&self) -> Value {
        let text =
            if self.subsec_millis() == 0 { format!("{}s", self.as_secs()) } else { format!("{}ms", self.as_millis()) };
        Value::Text(text)
    }
    fn parse(text: &str) -> Value {
        text.parse().map_or_else(|_| Value::Text(text.to_owned()), Value::Int)
    }
}

/// A time with its unit: `500ms`, `30s`, `2m`.
fn time(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let number: u64 = text.get(..digits)?.parse().ok()?;
    match text.get(digits..)?.trim() {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        _ => None,
    }
}

/// An enum that a file names by strings.
macro_rules! choice {
    ($(#[doc = $about:literal])+ $name:ident { $($(#[doc = $doc:literal])+ $variant:ident = $text:literal,)+ }) => {
        $(#[doc = $about])+
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum $name {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl $name {
            /// The name a configuration file has for it.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    $($name::$variant => $text,)+
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl $crate::setting::Setting for $name {
            fn wanted(_: $crate::setting::Rule) -> String {
                let names = [$(concat!("\"", $text, "\"")),+];
                if let [one] = names.as_slice() { (*one).to_owned() } else { format!("one of {}", names.join(", ")) }
            }
            fn read(value: &$crate::value::Value, _: $crate::setting::Rule) -> Option<Self> {
                match value {
                    $($crate::value::Value::Text(text) if text == $text => Some($name::$variant),)+
                    _ => None,
                }
            }
            fn write(&self) -> $crate::value::Value {
                $crate::value::Value::Text(self.as_str().to_owned())
            }
        }
    };
}
pub(crate) use choice;
