//! `kata config`.

use std::path::Path;

use config::{Config, Explanation, Value};
use serde_json::json;

use crate::cli::Format;
use crate::failure::Failure;
use crate::output;

/// `kata config show`.
pub(crate) fn show(file: Option<&Path>, format: Format) -> Result<(), Failure> {
    let shown = Config::load(file)?.show();
    match format {
        Format::Table => {
            let rows: Vec<_> = shown
                .iter()
                .map(|shown| vec![shown.key.to_owned(), shown.value.to_string(), shown.origin.to_string()])
                .collect();
            output::print(&output::table(&["KEY", "VALUE", "ORIGIN"], &rows))
        }
        Format::Json => {
            let entry = |shown: &config::Shown| json!({ "key": shown.key, "value": value(&shown.value), "origin": shown.origin.to_string() });
            output::json(&shown.iter().map(entry).collect::<Vec<_>>())
        }
    }
}

/// `kata config check`.
pub(crate) fn check(file: Option<&Path>) -> Result<(), Failure> {
    let config = Config::load(file)?;
    let sources: Vec<String> = config.sources().iter().map(|path| path.display().to_string()).collect();
    output::print(&match sources.as_slice() {
        [] => "No configuration file: every key has its default\n".to_owned(),
        files => format!("The configuration is good: {}\n", files.join(", ")),
    })
}

/// `kata config explain`.
pub(crate) fn explain(file: Option<&Path>, key: Option<&str>, format: Format) -> Result<(), Failure> {
    // A broken file must not keep its reader from finding out how to mend it.
    let config = Config::load(file).or_else(|_| config::installed_prefix().map(|prefix| Config::defaults(&prefix)))?;
    let explained = match key {
        Some(key) => config.explain(key)?,
        None => {
            let mut all = Vec::new();
            for shown in config.show() {
                all.extend(config.explain(shown.key)?);
            }
            all
        }
    };
    match format {
        Format::Table => {
            let texts: Vec<String> = explained.iter().map(text).collect();
            output::print(&texts.join("\n"))
        }
        Format::Json => {
            let entry = |explained: &Explanation| {
                json!({
                    "key": explained.key,
                    "doc": explained.doc,
                    "values": explained.values,
                    "default": value(&explained.default),
                    "value": value(&explained.current.value),
                    "origin": explained.current.origin.to_string(),
                    "annotation": explained.annotation,
                })
            };
            output::json(&explained.iter().map(entry).collect::<Vec<_>>())
        }
    }
}

fn text(explained: &Explanation) -> String {
    let mut text = output::paint(&std::io::stdout(), "1", explained.key);
    for line in explained.doc.lines() {
        text.push_str(&format!("\n  {line}"));
    }
    let mut facts = vec![
        ("takes", explained.values.clone()),
        ("default", explained.default.to_string()),
        ("value", format!("{}  ({})", explained.current.value, explained.current.origin)),
    ];
    if let Some(annotation) = &explained.annotation {
        facts.push(("annotation", annotation.clone()));
    }
    for (name, fact) in facts {
        text.push_str(&format!("\n  {:<11} {fact}", format!("{name}:")));
    }
    text.push('\n');
    text
}

fn value(value: &Value) -> serde_json::Value {
    match value {
        Value::Bool(value) => json!(value),
        Value::Int(value) => json!(value),
        Value::Float(value) => json!(value),
        Value::Text(value) => json!(value),
        Value::List(values) => values.iter().map(self::value).collect(),
        Value::Other(kind) => json!(kind),
    }
}
