//! What the dial of a model turns.

use std::sync::RwLock;

use dynamoe::{
    Budget, Dial, DynaMoeConfig,
    dial::{check_dial, sensitivities_for_budget},
};

use crate::{
    locks::{read, write},
    moe::{MoeExperts, budgets::Table},
};

/// What the dial of a model turns.
#[derive(Debug)]
pub enum ModelKind {
    /// The width of the FFNs of a DynaMoE model: the `dynamoe` section of its config.json.
    DynaMoe(DynaMoeConfig),
    /// The number of experts that the MoE layers of an ordinary model run.
    Moe(Moe),
}

/// An MoE model's experts and its table of budgets.
#[derive(Debug)]
pub struct Moe {
    /// The experts.
    pub experts: MoeExperts,
    budgets: RwLock<Vec<Budget>>,
}

impl Moe {
    /// A model without a table of budgets.
    pub(crate) fn new(experts: MoeExperts) -> Self {
        Self { experts, budgets: RwLock::default() }
    }

    /// Takes a table of budgets.
    ///
    /// # Errors
    /// A table of another model.
    pub fn set_budgets(&self, table: Table) -> anyhow::Result<()> {
        let Table { architecture, experts_per_token, budgets, .. } = table;
        anyhow::ensure!(
            (&architecture, experts_per_token)
                == (&self.experts.architecture, self.experts.experts_per_token),
            "the table of budgets belongs to another model: expected {} with {} experts per token, found {architecture} \
             with {experts_per_token}",
            self.experts.architecture,
            self.experts.experts_per_token
        );
        *write(&self.budgets) = budgets;
        Ok(())
    }
}

impl ModelKind {
    /// What each step of the dial uses of an FFN, smallest step first: neurons of an expert, or a number of experts.
    pub(crate) fn sizes(&self) -> Vec<usize> {
        match self {
            Self::DynaMoe(config) => config.expert_widths.clone(),
            Self::Moe(moe) => (1..=moe.experts.experts_per_token).collect(),
        }
    }

    /// The table of budgets: each budget is a mean share of the whole.
    pub fn budgets(&self) -> Vec<Budget> {
        match self {
            Self::DynaMoe(config) => config.budgets.clone(),
            Self::Moe(moe) => read(&moe.budgets).clone(),
        }
    }

    /// The sensitivity of each of `layers` layers.
    ///
    /// # Errors
    /// A value outside 0 to 1, a budget without a table of budgets.
    pub(crate) fn sensitivities(&self, dial: Dial, layers: usize) -> dynamoe::Result<Vec<f64>> {
        match (self, dial) {
            (Self::DynaMoe(config), dial) => dial.sensitivities(config, layers),
            (Self::Moe(_), Dial::Sensitivity(sensitivity)) => {
                check_dial("sensitivity", sensitivity)?;
                Ok(vec![sensitivity; layers])
            }
            (Self::Moe(moe), Dial::Budget(budget)) => {
                let smallest = 1.0 / moe.experts.experts_per_token as f64;
                let found = sensitivities_for_budget(&read(&moe.budgets), smallest, budget, layers)?;
                found.ok_or_else(|| {
                    dynamoe::Error::Config(
                        "the model has no table of budgets: make one with `dynamoe-budgets --model MODEL --data TEXT`, or \
                         set a sensitivity"
                            .into(),
                    )
                })
            }
        }
    }
}
