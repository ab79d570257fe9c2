//! Transcript of the consoles: their last lines for reports, a file with the time of each line, and the patterns that
//! end a run.
//!
//! The transcript is written by the thread that writes the console's output, so a guest waits for it no more than for
//! the output itself.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use regex_lite::Regex;

use super::output::Destination;
use crate::guest_event::{GuestEvent, GuestEvents};
use crate::printable::is_hidden;

/// Number of lines kept.
pub const LINES: usize = 50;
/// Maximum length of a line in bytes; a longer one counts as several.
const LINE_MAX: usize = 4096;
/// Time after which an unfinished line is matched as it is: like a prompt, it may be waiting for input.
const PROMPT: Duration = Duration::from_secs(1);

/// A regular expression that a line of the console may match.
#[derive(Clone)]
pub struct Pattern(Regex);

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Regex::new(text).map(Pattern).map_err(|e| format!("invalid regular expression: {e}"))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

/// Patterns that end a run.
#[derive(Clone, Default)]
pub struct Patterns {
    /// Patterns of success: the first one seen ends the run.
    pub expect: Vec<Pattern>,
    /// Patterns of failure: the first one seen ends the run.
    pub fail_on: Vec<Pattern>,
}

/// A pattern that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// True if the pattern is one of [`Patterns::expect`].
    pub good: bool,
    /// Text of the pattern.
    pub pattern: String,
    /// Line that matched.
    pub line: String,
}

/// Transcript of a machine's consoles. Clones share it.
#[derive(Clone)]
pub struct Transcript(Arc<Mutex<State>>);

struct State {
    start: Instant,
    last: VecDeque<String>,
    log: Option<File>,
    patterns: Patterns,
    verdict: Option<Verdict>,
    events: Option<GuestEvents>,
    /// Last, unfinished line of each console and the time of its last change; lines already matched are removed.
    unfinished: BTreeMap<usize, (String, Instant)>,
    readers: usize,
}

impl Transcript {
    /// Creates a transcript whose times count from `start`. Every line also goes to `log`.
    pub fn new(start: Instant, log: Option<File>, patterns: Patterns) -> Self {
        let (last, unfinished) = (VecDeque::with_capacity(LINES), BTreeMap::new());
        let state = State { start, last, log, patterns, verdict: None, events: None, unfinished, readers: 0 };
        Transcript(Arc::new(Mutex::new(state)))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the queue that is notified when a pattern was seen ([`GuestEvent::Judged`]).
    pub fn tell(&self, events: &GuestEvents) {
        self.lock().events = Some(events.clone());
    }

    /// Wraps a destination so that its output also goes to the transcript. Without `inner`, it goes only there.
    pub fn destination(&self, inner: Option<Destination>) -> Destination {
        let (name, eager, told, inner) = match inner {
            Some(Destination { name, writer, eager, told }) => (name, eager, told, Some(writer)),
            None => ("the console".into(), false, false, None),
        };
        let mut state = self.lock();
        state.readers += 1;
        let (transcript, id, console) = (self.clone(), state.readers, name.clone());
        let reader = Reader { transcript, id, console, line: Vec::new(), inner, told };
        drop(state);
        Destination { name, writer: Box::new(reader), eager, told }
    }

    /// The last lines, oldest first.
    pub fn last_lines(&self) -> Vec<String> {
        self.lock().last.iter().cloned().collect()
    }

    /// Returns true if there are patterns of success.
    pub fn expects(&self) -> bool {
        !self.lock().patterns.expect.is_empty()
    }

    /// Matches lines that have been unfinished for a second. Call this now and then.
    pub fn look(&self, now: Instant) {
        let mut state = self.lock();
        let waits = |line: &(String, Instant)| now.saturating_duration_since(line.1) >= PROMPT;
        if state.unfinished.values().any(waits) {
            let (waiting, moving) =
                std::mem::take(&mut state.unfinished).into_iter().partition(|(_, line)| waits(line));
            state.unfinished = moving;
            let waiting: BTreeMap<_, _> = waiting;
            waiting.values().for_each(|(line, _)| state.judge(line));
        }
    }

    /// Returns the first pattern that was seen.
    pub fn verdict(&self) -> Option<Verdict> {
        self.lock().verdict.clone()
    }
}

impl State {
    /// Matches a line against the patterns, unless one was seen already.
    fn judge(&mut self, line: &str) {
        if self.verdict.is_some() {
            return;
        }
        let Patterns { expect, fail_on } = &self.patterns;
        let all = fail_on.iter().map(|pattern| (false, pattern)).chain(expect.iter().map(|pattern| (true, pattern)));
        let found = all.into_iter().find(|(_, pattern)| pattern.0.is_match(line));
        if let Some((good, pattern)) = found {
            // The line will be part of a message.
            let line = line.chars().filter(|c| !is_hidden(*c)).collect();
            self.verdict = Some(Verdict { good, pattern: pattern.to_string(), line });
            self.events.iter().for_each(|events| events.post(GuestEvent::Judged));
        }
    }
}

struct Reader {
    transcript: Transcript,
    /// Number of the console that this reads.
    id: usize,
    /// Name of the console in messages.
    console: String,
    line: Vec<u8>,
    inner: Option<Box<dyn Write + Send>>,
    /// See [`Destination::told`].
    told: bool,
}

impl Write for Reader {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = match self.inner.as_mut().map(|inner| inner.write(bytes)) {
            None => bytes.len(),
            Some(Ok(n)) if n > 0 => n,
            Some(Err(e)) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {
                return Err(e);
            }
            // Continue the transcript even if the destination fails.
            Some(result) => {
                let error = result.err().unwrap_or_else(|| io::ErrorKind::WriteZero.into());
                let level = if self.told { log::Level::Debug } else { log::Level::Warn };
                let name = &self.console;
                log::log!(level, "{name}: cannot write console output ({error}); further output is discarded");
                self.inner = None;
                bytes.len()
            }
        };
        for byte in bytes.iter().take(n) {
            if *byte == b'\n' || self.line.len() >= LINE_MAX {
                self.end_line();
            }
            if !matches!(byte, b'\n' | b'\r') {
                self.line.push(*byte);
            }
        }
        self.note_unfinished();
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.as_mut().map_or(Ok(()), Write::flush)
    }
}

impl Reader {
    /// Records the unfinished line for [`Transcript::look`], if there are patterns to match.
    fn note_unfinished(&self) {
        let mut state = self.transcript.lock();
        if state.verdict.is_some() || state.patterns.expect.is_empty() && state.patterns.fail_on.is_empty() {
            return;
        }
        state.unfinished.remove(&self.id);
        if !self.line.is_empty() {
            let line = String::from_utf8_lossy(&self.line).into_owned();
            state.unfinished.insert(self.id, (line, Instant::now()));
        }
    }

    fn end_line(&mut self) {
        let line = String::from_utf8_lossy(&self.line).into_owned();
        self.line.clear();
        let mut state = self.transcript.lock();
        let time = state.start.elapsed().as_secs_f64();
        if let Some(Err(e)) = state.log.as_mut().map(|log| log.write_all(format!("{time:12.6} {line}\n").as_bytes())) {
            log::warn!("cannot write the console's log ({e}); no more lines are logged");
            state.log = None;
        }
        state.judge(&line);
        if state.last.len() == LINES {
            state.last.pop_front();
        }
        state.last.push_back(line);
    }
}

impl Drop for Reader {
    /// Ends the last line, which may lack a newline.
    fn drop(&mut self) {
        if !self.line.is_empty() {
            self.end_line();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(expect: &[&str], fail_on: &[&str]) -> Patterns {
        let all = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect();
        Patterns { expect: all(expect), fail_on: all(fail_on) }
    }

    #[test]
    fn the_last_lines_are_kept_and_timed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let transcript = Transcript::new(Instant::now(), Some(File::create(&path).unwrap()), Patterns::default());
        let (mut reader, writer) = io::pipe().unwrap();
        let inner = Destination { name: "x".into(), writer: Box::new(writer), eager: true, told: false };
        let mut destination = transcript.destination(Some(inner));
        for n in 0..60 {
            write!(destination.writer, "line {n}\r\n").unwrap();
        }
        destination.writer.write_all(&[b'x'; LINE_MAX + 1]).unwrap();
        drop(destination);
        let lines = transcript.last_lines();
        assert_eq!(lines.len(), LINES);
        assert_eq!((lines[0].as_str(), lines[47].as_str()), ("line 12", "line 59"));
        assert_eq!((lines[48].len(), lines[49].as_str()), (LINE_MAX, "x"), "cut where it is too long");
        let log = std::fs::read_to_string(path).unwrap();
        assert_eq!(log.lines().count(), 62);
        let (time, text) = log.lines().next().unwrap().trim_start().split_once(' ').unwrap();
        assert!(time.parse::<f64>().is_ok() && text == "line 0", "{time} {text}");
        let mut seen = String::new();
        io::Read::read_to_string(&mut reader, &mut seen).unwrap();
        assert!(seen.starts_with("line 0\r\nline 1\r\n") && seen.ends_with('x'), "it passes on every byte");
    }

    #[test]
    fn the_first_pattern_judges() {
        let events = GuestEvents::new().unwrap();
        let transcript = Transcript::new(Instant::now(), None, patterns(&["^ok \\d+$"], &["(?i)oops"]));
        transcript.tell(&events);
        let mut destination = transcript.destination(None);
        destination.writer.write_all(b"not ok 1\nok").unwrap();
        assert_eq!((transcript.verdict(), events.take()), (None, None));
        destination.writer.write_all(b" 12\nOops: 0002\n").unwrap();
        assert_eq!(events.take(), Some(GuestEvent::Judged));
        let verdict = Verdict { good: true, pattern: "^ok \\d+$".into(), line: "ok 12".into() };
        assert_eq!(transcript.verdict(), Some(verdict));
        assert!("(".parse::<Pattern>().is_err());
    }

    #[test]
    fn a_prompt_waits_for_somebody() {
        let transcript = Transcript::new(Instant::now(), None, patterns(&["^ok \\d+$", "login: $"], &[]));
        let mut destination = transcript.destination(None);
        destination.writer.write_all(b"ok 1").unwrap();
        transcript.look(Instant::now());
        assert_eq!(transcript.verdict(), None, "it may become ok 12 of 20");
        destination.writer.write_all(b" of 2\nhost login: ").unwrap();
        transcript.look(Instant::now() + PROMPT);
        assert_eq!(transcript.verdict().map(|verdict| verdict.line).as_deref(), Some("host login: "));
    }

    #[test]
    fn it_reads_on_when_nobody_else_does() {
        let transcript = Transcript::new(Instant::now(), None, patterns(&[], &["BUG"]));
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let inner = Destination { name: "x".into(), writer: Box::new(writer), eager: true, told: true };
        let mut destination = transcript.destination(Some(inner));
        destination.writer.write_all(b"one\nBUG: two\n").unwrap();
        assert_eq!(transcript.last_lines(), ["one", "BUG: two"]);
        assert!(transcript.verdict().is_some());
    }
}
