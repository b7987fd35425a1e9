//! The chat page, and the widths in streams that it shows.

#[path = "support/browser.rs"]
mod browser;
#[path = "support/http.rs"]
mod http;
mod support;

use browser::Browser;
use http::{Server, chat, completion, with};
use serde_json::json;
use support::{SMALL, checkpoints};

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

#[test]
fn a_stream_tells_the_width_of_each_token() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 94);
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    for (route, body) in [(TEXT, completion("Hello", 8)), (CHAT, chat("Hello", 8))] {
        for (sensitivity, width) in [(0.0, 0.25), (1.0, 1.0)] {
            let body =
                with(with(body.clone(), "sensitivity", sensitivity), "logit_bias", json!({"257": -100}));
            let events = server.stream(route, &body);
            let choices = events.iter().map(|event| &event["choices"][0]);
            let spoken = choices.filter(|choice| {
                [&choice["text"], &choice["delta"]["content"]]
                    .iter()
                    .any(|text| **text != "" && text.is_string())
            });
            let widths: Vec<_> = spoken.map(|choice| choice["ffn_width"].as_f64()).collect();
            assert!(!widths.is_empty() && widths.iter().all(|found| *found == Some(width)), "{widths:?}");
        }
    }
    // each token by itself, and their mean is that of the usage but for the last one, which nothing follows
    let body = with(with(completion("H", 40), "sensitivity", 0.5), "logit_bias", json!({"257": -100}));
    let events = server.stream(TEXT, &body);
    let widths: Vec<f64> =
        events.iter().filter_map(|event| event["choices"][0]["ffn_width"].as_f64()).collect();
    let usage = events.last().unwrap()["usage"]["mean_ffn_width"].as_f64().unwrap();
    let mean = widths.iter().sum::<f64>() / widths.len() as f64;
    assert!(widths.iter().any(|width| *width != widths[0]), "{widths:?}");
    assert!((mean - usage).abs() < 0.05, "{mean}, {usage}");
}

#[test]
fn a_dense_model_tells_no_width() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 95);
    let server = Server::start(&checkpoints.dense(), &[]);
    let events = server.stream(TEXT, &completion("Hello", 4));
    assert!(events.iter().all(|event| event["choices"][0].get("ffn_width").is_none()));
}

#[test]
fn the_page_is_one_document_that_asks_this_server_only() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 96);
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    let page = server.get("/");
    assert_eq!(page.status(), 200);
    assert!(page.headers()["content-type"].to_str().unwrap().starts_with("text/html"));
    let policy = page.headers()["content-security-policy"].to_str().unwrap();
    assert!(policy.contains("default-src 'none'") && policy.contains("connect-src 'self'"), "{policy}");
}

#[test]
fn an_api_key_is_asked_of_everybody() {
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 98);
    let server = Server::start(&checkpoints.dynamoe(), &["--api-key", "secret"]);
    let ask = |key: Option<&str>| {
        let request = server.client.post(format!("{}{TEXT}", server.url)).json(&completion("Hello", 2));
        let request = key.map_or(request.try_clone().unwrap(), |key| request.bearer_auth(key));
        request.send().unwrap()
    };
    for wrong in [None, Some("Secret"), Some("")] {
        let refused = ask(wrong);
        assert_eq!(
            (refused.status().as_u16(), &refused.headers()["www-authenticate"]),
            (401, &"Bearer".parse().unwrap())
        );
        assert!(refused.text().unwrap().contains("Authorization: Bearer KEY"));
    }
    assert_eq!(ask(Some("secret")).status(), 200);
    for (route, status) in [("/", 200), ("/health", 200), ("/v1/models", 401), ("/metrics", 401), ("/x", 401)]
    {
        assert_eq!(server.get(route).status(), status, "{route}");
    }
    let Some(browser) = Browser::start() else { return };
    browser.open(&server.url, 1280, 900, false);
    browser.wait("!document.getElementById('locked').hidden");
    browser.script(
        "document.getElementById('api-key').value = 'secret';
         document.getElementById('api-key').dispatchEvent(new Event('change'));",
    );
    browser.wait("document.getElementById('model').textContent === 'dynamoe' && document.getElementById('locked').hidden");
    browser.script("document.getElementById('send').click();");
    browser.wait("document.querySelector('.figures').textContent.includes('mean width')");
}

/// Skipped, with a line that says so, where there is no Chromium with its driver.
#[test]
fn a_browser_shows_two_answers_coloured_by_width() {
    let Some(browser) = Browser::start() else { return };
    let checkpoints = checkpoints("LlamaForCausalLM", SMALL, 97);
    let server = Server::start(&checkpoints.dynamoe(), &[]);
    for (width, height, dark) in [(1280, 900, false), (390, 844, true)] {
        browser.open(&server.url, width, height, dark);
        browser.wait("document.getElementById('model').textContent === 'dynamoe'");
        browser.script(
            "document.getElementById('compare').click();
             document.querySelectorAll('.budget')[1].value = 0;
             document.querySelectorAll('.budget')[1].dispatchEvent(new Event('input'));
             document.getElementById('tokens').value = 24;
             document.getElementById('send').click();",
        );
        browser.wait(
            "document.getElementById('send').disabled === false
             && document.querySelectorAll('.figures')[1].textContent.includes('mean width')",
        );
        browser.screenshot(&format!("page-{width}-{}", if dark { "dark" } else { "light" }));
        let found = browser.script(
            "const panes = [...document.querySelectorAll('.pane')];
             return {
               classes: panes.map((pane) => [...new Set([...pane.querySelectorAll('.answer span')].map((s) => s.className))]),
               figures: panes.map((pane) => pane.querySelector('.figures').textContent),
               errors: document.querySelectorAll('.error').length,
               overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
               dark: getComputedStyle(document.body).backgroundColor,
             };",
        );
        assert_eq!(found["errors"], 0, "{found}");
        assert_eq!(found["overflow"], 0, "{found}");
        assert_eq!(found["classes"], json!([["w8"], ["w2"]]), "{found}");
        let figures = found["figures"].as_array().unwrap();
        assert!(figures[0].as_str().unwrap().contains("mean width 1.000"), "{found}");
        assert!(figures[1].as_str().unwrap().contains("mean width 0.250"), "{found}");
        let background = if dark { "rgb(14, 21, 27)" } else { "rgb(252, 253, 254)" };
        assert_eq!(found["dark"], background);
    }
    // a server that ends is told on the page
    drop(server);
    browser.script("document.getElementById('send').click();");
    browser.wait("document.querySelectorAll('.error').length > 0");
}
