//! An error with all its causes in one line, for the places where errors leave the program.

use std::error::Error;
use std::fmt::{Display, Formatter, Result};

/// Shows an error and its sources, separated by `: `.
pub(crate) struct Chain<'a>(pub(crate) &'a dyn Error);

impl Display for Chain<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}
