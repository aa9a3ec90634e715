//! A value as written in a file or an annotation, before a key gives it a type.

use std::fmt;

use toml::de::{DeInteger, DeValue};

/// What stands to the right of an equals sign.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number with a fraction.
    Float(f64),
    /// A string.
    Text(String),
    /// An array.
    List(Vec<Value>),
    /// Something no key takes (a table, a date, a number beyond 64 bits), by its name.
    Other(&'static str),
}

impl Value {
    /// The value's type, as an error calls it.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Value::Bool(_) => "a boolean",
            Value::Int(_) => "an integer",
            Value::Float(_) => "a number",
            Value::Text(_) => "a string",
            Value::List(_) => "an array",
            Value::Other(kind) => kind,
        }
    }
}

impl From<&DeValue<'_>> for Value {
    fn from(value: &DeValue<'_>) -> Self {
        match value {
            DeValue::Boolean(value) => Value::Bool(*value),
            DeValue::Integer(value) => integer(value),
            DeValue::Float(value) => value.as_str().parse().map_or(Value::Other("a number out of range"), Value::Float),
            DeValue::String(value) => Value::Text(value.to_string()),
            DeValue::Array(values) => Value::List(values.iter().map(|value| Value::from(value.get_ref())).collect()),
            DeValue::Table(_) => Value::Other("a table"),
            DeValue::Datetime(_) => Value::Other("a date"),
        }
    }
}

fn integer(value: &DeInteger<'_>) -> Value {
    i64::from_str_radix(value.as_str(), value.radix()).map_or(Value::Other("an integer beyond 64 bits"), Value::Int)
}

/// As TOML writes it.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Bool(value) => write!(f, "{value}"),
            Value::Int(value) => write!(f, "{value}"),
            Value::Float(value) => write!(f, "{value:?}"),
            Value::Text(value) => write!(f, "{}", toml::Value::String(value.clone())),
            Value::List(values) => {
                f.write_str("[")?;
                for (index, value) in values.iter().enumerate() {
                    let comma = if index == 0 { "" } else { ", " };
                    write!(f, "{comma}{value}")?;
                }
                f.write_str("]")
            }
            Value::Other(kind) => write!(f, "<{kind}>"),
        }
    }
}
