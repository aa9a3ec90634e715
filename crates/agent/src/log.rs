//! The log: one compact line an event, on standard error, which is the console in a guest.

use tracing::level_filters::LevelFilter;

/// Starts writing events of `level` and above. Later calls change nothing.
pub fn start(level: LevelFilter) {
    let subscriber = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_max_level(level)
        .with_ansi(false)
        .without_time()
        .with_target(false)
        .compact()
        .finish();
    // Fails only when there is one already: in tests that start several agents.
    let _ = tracing::subscriber::set_global_default(subscriber);
}
