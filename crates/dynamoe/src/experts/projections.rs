//! The three projections of an FFN, or of a part of it.

/// Something for each of a gated FFN's projections: a matrix, a layer, a name. The part may be the whole FFN, or one
/// shell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Projections<P> {
    /// Of the gate, whose output passes the activation.
    pub gate_proj: P,
    /// Of what the gate multiplies.
    pub up_proj: P,
    /// Of what comes back to the model's width.
    pub down_proj: P,
}

impl<P> Projections<P> {
    /// The same for what `f` makes of each, in the order gate, up, down.
    pub fn map<Q>(self, mut f: impl FnMut(P) -> Q) -> Projections<Q> {
        Projections { gate_proj: f(self.gate_proj), up_proj: f(self.up_proj), down_proj: f(self.down_proj) }
    }

    /// References to each.
    pub fn as_ref(&self) -> Projections<&P> {
        Projections { gate_proj: &self.gate_proj, up_proj: &self.up_proj, down_proj: &self.down_proj }
    }

    /// gate, up and down.
    pub fn into_array(self) -> [P; 3] {
        [self.gate_proj, self.up_proj, self.down_proj]
    }
}
