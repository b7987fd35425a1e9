//! A headless Chromium, by its driver's WebDriver protocol.

use std::{
    net::TcpListener,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use reqwest::blocking::Client;
use serde_json::{Value, json};

/// A browser with one window; dropping it ends it.
pub struct Browser {
    driver: Child,
    client: Client,
    session: String,
}

impl Browser {
    /// Starts one. None, and a line that says so, if there is no `chromedriver`.
    pub fn start() -> Option<Self> {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let started = Command::new("chromedriver")
            .arg(format!("--port={port}"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(driver) = started else {
            println!("skipped: no chromedriver (Debian: chromium-driver)");
            return None;
        };
        let client = Client::builder().timeout(Duration::from_secs(60)).build().unwrap();
        let capabilities = json!({"capabilities": {"alwaysMatch": {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]},
        }}});
        let url = format!("http://127.0.0.1:{port}/session");
        let deadline = Instant::now() + Duration::from_secs(30);
        let answer = loop {
            match client.post(&url).json(&capabilities).send() {
                Ok(answer) => break answer.json::<Value>().unwrap(),
                Err(error) => assert!(Instant::now() < deadline, "chromedriver does not answer: {error}"),
            }
            thread::sleep(Duration::from_millis(100));
        };
        let id = answer["value"]["sessionId"].as_str().unwrap_or_else(|| panic!("no session: {answer}"));
        Some(Self { driver, client, session: format!("{url}/{id}") })
    }

    fn post(&self, command: &str, body: &Value) -> Value {
        let answer = self.client.post(format!("{}/{command}", self.session)).json(body).send().unwrap();
        let (status, answer) = (answer.status(), answer.json::<Value>().unwrap());
        assert!(status.is_success(), "{command}: {answer}");
        answer["value"].clone()
    }

    /// A command of Chromium's own protocol.
    fn chromium(&self, command: &str, params: Value) {
        self.post("goog/cdp/execute", &json!({"cmd": command, "params": params}));
    }

    /// Opens an address in a view of this size, light or dark.
    pub fn open(&self, url: &str, width: u32, height: u32, dark: bool) {
        let scheme = if dark { "dark" } else { "light" };
        let view = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600});
        self.chromium("Emulation.setDeviceMetricsOverride", view);
        let feature = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.chromium("Emulation.setEmulatedMedia", feature);
        self.post("url", &json!({"url": url}));
    }

    /// What a function with this body returns.
    pub fn script(&self, body: &str) -> Value {
        self.post("execute/sync", &json!({"script": body, "args": []}))
    }

    /// Waits until an expression holds.
    pub fn wait(&self, expression: &str) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.script(&format!("return Boolean({expression});")) != json!(true) {
            let page = self.script("return document.body.innerText;");
            assert!(Instant::now() < deadline, "waited in vain for {expression}: {page}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Writes what is to be seen to NAME.png in the folder of $DYNAMOE_SCREENSHOTS, if that is set.
    pub fn screenshot(&self, name: &str) {
        let Some(folder) = std::env::var_os("DYNAMOE_SCREENSHOTS") else { return };
        let answer = self.client.get(format!("{}/screenshot", self.session)).send().unwrap();
        let base64 = answer.json::<Value>().unwrap()["value"].as_str().unwrap().to_owned();
        let path = std::path::Path::new(&folder).join(format!("{name}.png"));
        std::fs::write(path, BASE64_STANDARD.decode(base64).unwrap()).unwrap();
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.client.delete(&self.session).send();
        let _ = self.driver.kill();
        let _ = self.driver.wait();
    }
}
