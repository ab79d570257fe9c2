//! The notes that the two ends exchange, as lists of byte strings: arguments, variables and paths need not be UTF-8.

use std::io;
use std::str::FromStr;

/// A message that travels as a list of byte strings, the first of which names its kind.
pub(crate) trait Note: Sized {
    fn write(&self, words: &mut Words);
    fn read(words: &mut Words) -> Option<Self>;

    fn to_bytes(&self) -> Vec<u8> {
        let mut words = Words::default();
        self.write(&mut words);
        words.bytes
    }

    fn from_bytes(bytes: Vec<u8>) -> io::Result<Self> {
        Self::read(&mut Words { bytes, at: 0 }).ok_or_else(|| io::Error::other("a note that makes no sense"))
    }
}

/// Byte strings one after the other, each after its length in four bytes, and a place to read from.
#[derive(Default)]
pub(crate) struct Words {
    bytes: Vec<u8>,
    at: usize,
}

impl Words {
    fn put(&mut self, word: impl AsRef<[u8]>) -> &mut Words {
        self.bytes.extend((word.as_ref().len() as u32).to_le_bytes());
        self.bytes.extend(word.as_ref());
        self
    }

    fn number(&mut self, number: impl ToString) -> &mut Words {
        self.put(number.to_string())
    }

    /// Appends a list: its length, then each item.
    fn list<T>(&mut self, items: &[T], put: impl for<'a> Fn(&'a mut Words, &T) -> &'a mut Words) -> &mut Words {
        self.number(items.len());
        for item in items {
            put(self, item);
        }
        self
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        let (length, rest) = self.bytes.get(self.at..)?.split_first_chunk()?;
        let word = rest.get(..u32::from_le_bytes(*length) as usize)?.to_vec();
        self.at += 4 + word.len();
        Some(word)
    }

    fn take_text(&mut self) -> Option<String> {
        String::from_utf8(self.take()?).ok()
    }

    fn take_number<T: FromStr>(&mut self) -> Option<T> {
        self.take_text()?.parse().ok()
    }

    fn take_list<T>(&mut self, take: impl Fn(&mut Words) -> Option<T>) -> Option<Vec<T>> {
        let count: usize = self.take_number()?;
        (0..count).map(|_| take(self)).collect()
    }
}

/// The first note of a connection.
pub(crate) enum Hello {
    Ping,
    Run(Request),
}

/// A command to run.
pub(crate) struct Request {
    pub(crate) argv: Vec<Vec<u8>>,
    pub(crate) env: Vec<(Vec<u8>, Vec<u8>)>,
    pub(crate) cwd: Vec<u8>,
    /// Rows and columns of the client's terminal, when the command is to have one of its own.
    pub(crate) tty: Option<(u16, u16)>,
    /// Programs that may have been rebuilt, each with a stamp that tells its versions apart.
    pub(crate) programs: Vec<(Vec<u8>, String)>,
}

impl Note for Hello {
    fn write(&self, words: &mut Words) {
        let Hello::Run(request) = self else {
            words.put("ping");
            return;
        };
        words.put("run").put(&request.cwd).list(&request.argv, |words, argument| words.put(argument));
        words.list(&request.env, |words, (key, value)| words.put(key).put(value));
        words.list(request.tty.as_slice(), |words, (rows, columns)| words.number(rows).number(columns));
        words.list(&request.programs, |words, (path, stamp)| words.put(path).put(stamp));
    }

    fn read(words: &mut Words) -> Option<Hello> {
        Some(match &*words.take()? {
            b"ping" => Hello::Ping,
            b"run" => Hello::Run(Request {
                cwd: words.take()?,
                argv: words.take_list(Words::take)?,
                env: words.take_list(|words| Some((words.take()?, words.take()?)))?,
                tty: words.take_list(|words| Some((words.take_number()?, words.take_number()?)))?.pop(),
                programs: words.take_list(|words| Some((words.take()?, words.take_text()?)))?,
            }),
            _ => return None,
        })
    }
}

/// Message from the client to the agent, while the command runs.
pub(crate) enum Control {
    Signal(i32),
    WindowSize(u16, u16),
}

impl Note for Control {
    fn write(&self, words: &mut Words) {
        match self {
            Control::Signal(signal) => words.put("signal").number(signal),
            Control::WindowSize(rows, columns) => words.put("window").number(rows).number(columns),
        };
    }

    fn read(words: &mut Words) -> Option<Control> {
        Some(match &*words.take()? {
            b"signal" => Control::Signal(words.take_number()?),
            b"window" => Control::WindowSize(words.take_number()?, words.take_number()?),
            _ => return None,
        })
    }
}

/// Message from the agent to the client: one when the agent has seen the request, and one last of all.
pub(crate) enum Reply {
    Here,
    /// The command could not be started; the exit status a shell would give, and why.
    NotStarted(i32, String),
    Exited(i32),
}

impl Note for Reply {
    fn write(&self, words: &mut Words) {
        match self {
            Reply::Here => words.put("here"),
            Reply::NotStarted(status, why) => words.put("not-started").number(status).put(why),
            Reply::Exited(status) => words.put("exited").number(status),
        };
    }

    fn read(words: &mut Words) -> Option<Reply> {
        Some(match &*words.take()? {
            b"here" => Reply::Here,
            b"not-started" => Reply::NotStarted(words.take_number()?, words.take_text()?),
            b"exited" => Reply::Exited(words.take_number()?),
            _ => return None,
        })
    }
}
