//! What a server answers that has certificates, before there is TLS.

use std::path::Path;

use peer::tls::Acceptor;
use peer::wire::{
    OPTION_ABORT, OPTION_BYTES, OPTION_EXPORT_NAME, OPTION_INFO, OPTION_LIST, OPTION_STARTTLS,
    REP_ERR_INVALID, REP_ERR_TLS_REQD, REP_ERR_UNSUP,
};

use super::*;

fn with_certificates(store: &SimStore) -> SimServer {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../peer/testdata/own");
    let acceptor = Acceptor::new(&folder, &[]).unwrap();
    server_with(store, Unclaimed::Write, Some(acceptor))
}

#[test]
fn nothing_is_answered_in_plain_text() {
    run(async {
        let server = with_certificates(&SimStore::new(SIZE));
        let client = Client::new(&server, WIDE).await;
        for option in [OPTION_GO, OPTION_INFO, OPTION_LIST, OPTION_CLAIM, 77] {
            client.option(option, &[0; 8]).await;
            let (kind, why) = client.option_reply().await.unwrap();
            assert_eq!(kind, REP_ERR_TLS_REQD, "option {option}");
            assert!(String::from_utf8(why).unwrap().contains("TLS"));
        }
        client.option(OPTION_STARTTLS, b"data").await;
        assert_eq!(client.option_reply().await.unwrap().0, REP_ERR_INVALID);
        client.option(OPTION_ABORT, &[]).await;
        assert_eq!(client.option_reply().await.unwrap().0, REP_ACK);
        assert_eq!(client.0.hear(1).await, None);
        // The form that cannot be refused ends the session.
        let client = Client::new(&server, WIDE).await;
        client.option(OPTION_EXPORT_NAME, b"m").await;
        assert_eq!(client.0.hear(1).await, None);
    });
}

/// What somebody on the way adds to a client's wish for TLS would be taken for the client's.
#[test]
fn nothing_is_taken_along_into_tls() {
    run(async {
        let server = with_certificates(&SimStore::new(SIZE));
        let client = Client::new(&server, WIDE).await;
        let mut words = Vec::new();
        for option in [OPTION_STARTTLS, OPTION_LIST] {
            words.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
            words.extend_from_slice(&option.to_be_bytes());
            words.extend_from_slice(&[0; 4]);
        }
        assert_eq!(words.len(), 2 * OPTION_BYTES);
        assert!(client.0.say(&words).await);
        assert_eq!(client.option_reply().await.unwrap().0, REP_ACK);
        assert_eq!(client.0.hear(1).await, None);
    });
}

/// Who shows no certificate is not waited for as long as others.
#[test]
fn who_does_not_begin_tls_is_cut_soon() {
    run(async {
        let server = with_certificates(&SimStore::new(SIZE));
        let client = Client::new(&server, WIDE).await;
        tokio::time::sleep(Duration::from_millis(2900)).await;
        client.option(OPTION_LIST, &[]).await;
        assert_eq!(client.option_reply().await.unwrap().0, REP_ERR_TLS_REQD);
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(client.0.hear(1).await, None);
    });
}

#[test]
fn without_certificates_there_is_no_tls() {
    run(async {
        let server = server(&SimStore::new(SIZE), Unclaimed::Read);
        let client = Client::new(&server, WIDE).await;
        client.option(OPTION_STARTTLS, &[]).await;
        assert_eq!(client.option_reply().await.unwrap().0, REP_ERR_UNSUP);
        client.go().await;
    });
}
